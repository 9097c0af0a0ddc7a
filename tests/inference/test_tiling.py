"""colora_peft/inference/tiling.py: laws of restored images, then errors."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from PIL import Image
from support.tiny_networks import tiny_nafnet, tiny_restormer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from colora_peft import CoLoRAConfig, restore_image
from colora_peft.inference.network import reconstruct


class Local(nn.Module):
    """Sees 3 pixels around each one, at half resolution, and pools nothing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return F.interpolate(self.conv(F.avg_pool2d(x, 2)), scale_factor=2) + x / 2


class Toned(Local):
    """`depth` times: a convolution times a gate that depends on the mean over the image."""

    def __init__(self, depth=1):
        super().__init__()
        self.pool, self.depth = nn.AdaptiveAvgPool2d(1), depth

    def forward(self, x):
        for _ in range(self.depth):
            x = torch.sigmoid(x + self.conv(x) * self.pool(x))
        return x


class Identity(nn.Module):
    def forward(self, x):
        return x


def sample_image(height=70, width=90, seed=0):
    """Dark at the left and bright at the right, so that tiles differ in their means."""
    noise = torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))
    return (noise + torch.linspace(0, 1, width)) / 2


SIZES = [(1, 1), (1, 200), (200, 1), (3, 5), (70, 90), (64, 64)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("settings", [{}, {"batch_size": 3}, {"self_ensemble": True}, {"pooling": "tile"}])
def test_the_identity_comes_back(size, settings):
    image = sample_image(*size)
    torch.testing.assert_close(
        restore_image(Identity(), image, tile=32, overlap=8, size_multiple=4, **settings), image, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("size", SIZES)
def test_tiles_of_a_network_that_sees_no_further_than_the_overlap_are_the_whole(size):
    image = sample_image(*size)
    whole = restore_image(Local(), image, tile=None, size_multiple=2)
    tiled = restore_image(Local(), image, tile=32, overlap=16, size_multiple=2, batch_size=2)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("make", [tiny_nafnet, lambda: get_peft_model(tiny_nafnet(), CoLoRAConfig(ranks=2))])
def test_one_tile_is_what_the_network_returns_clamped(make):
    model, image = make(), sample_image(30, 44)
    whole = reconstruct(model, image[None])[0].clamp(0, 1)
    assert torch.equal(restore_image(model, image, tile=None, size_multiple=1), whole)  # padded by the network
    image = sample_image(32, 44)
    whole = reconstruct(model, image[None])[0].clamp(0, 1)
    for settings in ({"tile": None}, {}, {"tile": 44, "overlap": 8}, {"pooling": "local", "pooling_window": 44}):
        assert torch.equal(restore_image(model, image, **settings), whole), settings


def test_tiles_lie_at_multiples_of_what_the_network_takes():
    class Strict(Local):
        needs_multiple_of = 8

        def forward(self, x):
            assert not x.shape[-1] % 8 and not x.shape[-2] % 8
            return super().forward(x)

    image = sample_image(70, 93)
    whole = restore_image(Strict(), image, tile=None)
    torch.testing.assert_close(restore_image(Strict(), image, tile=30, overlap=10), whole, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="size multiple of 8"):
        restore_image(Strict(), image, tile=7, overlap=0)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_as_many_passes_as_pooling_layers_make_tiles_the_whole(depth):
    model, image = Toned(depth), sample_image()
    settings = {"tile": 32, "overlap": 16}
    whole = restore_image(model, image, tile=None)
    errors = [(restore_image(model, image, **settings, pooling="tile") - whole).abs().max().item()]
    for passes in range(1, depth + 1):
        restored = restore_image(model, image, **settings, statistics_passes=passes)
        errors.append((restored - whole).abs().max().item())
    assert errors == sorted(errors, reverse=True) and errors[0] > 1e-3
    assert errors[-1] < 2e-6


def test_statistics_bring_the_tiles_of_nafnet_near_the_whole():
    model, image = tiny_nafnet(), sample_image(64, 112)
    whole = restore_image(model, image, tile=None)
    plain, with_statistics = (
        (restore_image(model, image, tile=64, overlap=32, pooling=pooling) - whole).square().mean().sqrt().item()
        for pooling in ("tile", "picture")
    )
    assert with_statistics < plain / 3


def test_statistics_bring_the_tiles_of_restormer_near_the_whole():
    """Its attention takes means of products over all pixels."""
    model, image = tiny_restormer(), sample_image(64, 112)
    whole = restore_image(model, image, tile=None)
    plain, with_statistics = (
        (restore_image(model, image, tile=64, overlap=32, pooling=pooling) - whole).square().mean().sqrt().item()
        for pooling in ("tile", "picture")
    )
    assert with_statistics < plain / 3
    assert torch.equal(restore_image(model, image, tile=112), whole)  # one tile


@pytest.mark.parametrize("pooling", ["tile", "picture"])
def test_self_ensemble_turns_with_the_image(pooling):
    # One pooling layer: the order of the tiles, which turns with the image, makes no difference to one pass.
    model, image = Toned(1), sample_image(32, 48)
    settings = {"tile": 24, "overlap": 16, "self_ensemble": True, "pooling": pooling}
    restored = restore_image(model, image, **settings)
    for turn in (lambda x: x.flip(-1), lambda x: x.flip(-2), lambda x: x.transpose(-1, -2)):
        torch.testing.assert_close(restore_image(model, turn(image), **settings), turn(restored), rtol=0, atol=1e-6)
    assert not torch.allclose(restore_image(model, image, tile=24, overlap=16, pooling=pooling), restored, atol=1e-4)


class Sizes(TorchDispatchMode):
    """Elements of the storage of every tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.storages = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        given = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if torch.is_tensor(each)}
        for each in tree_leaves(output):
            if torch.is_tensor(each) and each.untyped_storage()._cdata not in given:
                self.storages.append(each.untyped_storage().nbytes() // 4)
        return output


@pytest.mark.parametrize("settings", [{}, {"self_ensemble": True}, {"pooling": "local", "pooling_window": 16}])
def test_memory_is_bounded_by_the_tile(settings):
    model, image = Toned(), sample_image(40, 200)
    with Sizes() as sizes:
        restore_image(model, image, tile=32, overlap=8, batch_size=2, statistics_passes=1, **settings)
    largest = sorted(sizes.storages)[-2:]
    # Besides the result nothing is larger than two tiles, or the probe of 64 x 64 that shows the layers' resolution.
    assert largest[1] == image.numel() and largest[0] <= 2 * 3 * 32 * 64


def test_half_precision_is_near_and_is_used():
    model, image = tiny_nafnet(), sample_image(32, 60)
    full = restore_image(model, image, tile=48, overlap=32)
    half = restore_image(model, image, tile=48, overlap=32, dtype=torch.bfloat16)
    assert half.dtype == torch.float32 and 0 < (half - full).abs().mean() < 0.02
    assert torch.equal(restore_image(model, image, tile=48, overlap=32, dtype=torch.float32), full)
    own = restore_image(tiny_nafnet().bfloat16(), image, tile=48, overlap=32)
    assert own.dtype == torch.float32 and (own - full).abs().mean() < 0.02


def test_modes_hooks_and_the_image_are_left_alone_and_no_graph_is_kept():
    model, image = tiny_nafnet().train(), sample_image(24, 40)
    model.middle_blks.eval()
    before = image.clone()
    for settings in ({}, {"pooling": "local", "pooling_window": 24}):
        restored = restore_image(model, image, tile=32, overlap=16, **settings)
        assert not restored.requires_grad and not restored.is_inference()
    assert model.training and not model.middle_blks.training and model.encoders.training
    assert torch.equal(image, before) and not any(module._forward_hooks for module in model.modules())


def test_bar_counts_every_tile_of_every_pass(capsys):
    restore_image(
        Toned(), sample_image(48, 48), tile=32, overlap=16, progress=True, self_ensemble=True, statistics_passes=2
    )
    assert "/96 " in capsys.readouterr().err  # 4 tiles, 8 transforms, 2 + 1 passes
    restore_image(Toned(), sample_image(48, 48), tile=32, overlap=16)
    assert capsys.readouterr().err == ""


class Wrong(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(x)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.rand(1, 3, 8, 8), r"\(3, H, W\) and not empty, got shape \(1, 3, 8, 8\)"),
        (torch.rand(1, 8, 8), r"got shape \(1, 8, 8\)"),
        (torch.rand(3, 0, 8), "not empty"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "uint8: pass floats"),
        (torch.full((3, 8, 8), 200.0), "from 200 to 200; it must lie"),
        (torch.rand(3, 8, 8).index_fill(2, torch.tensor(3), float("nan")), "from nan to nan"),
    ],
)
def test_what_is_no_image_is_refused(image, message):
    with pytest.raises(ValueError, match=message):
        restore_image(Identity(), image)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tile": 32, "overlap": 32}, "at most 28"),
        ({"tile": 3, "overlap": 0}, "smaller than the network's size multiple of 4"),
        ({"overlap": -1}, "negative"),
        ({"batch_size": 0}, "batch_size and statistics_passes must be at least 1, got 0 and 2"),
        ({"statistics_passes": 0}, "got 1 and 0"),
        ({"size_multiple": 0}, "size_multiple must be at least 1"),
        ({"pooling": "global"}, "'global'; take one of picture, tile, local"),
        ({"pooling": "local"}, "go together"),
        ({"pooling_window": 8}, "go together"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        restore_image(tiny_nafnet(), sample_image(8, 8), **settings)


def test_broken_networks_are_named_and_left_as_they_were():
    for change, error, message in (
        (lambda x: x[..., :-1], ValueError, "must keep the shape"),
        (lambda x: [x], TypeError, "returned list"),
        (lambda x: x / 0, ValueError, "Wrong returned NaN or infinite"),
    ):
        model = Wrong(change).train()
        with pytest.raises(error, match=message):
            restore_image(model, sample_image(), tile=32, overlap=8)
        assert model.training


def test_statistics_and_local_pooling_exclude_each_other():
    from colora_peft.inference import local_pooling

    model, image = tiny_nafnet(), sample_image(24, 24)
    expected = restore_image(model, image, tile=16, overlap=8, pooling="local", pooling_window=8)
    with local_pooling(model, window=8):
        with pytest.raises(ValueError, match='pass pooling="tile" inside'):
            restore_image(model, image)
        assert torch.equal(restore_image(model, image, tile=16, overlap=8, pooling="tile"), expected)


@pytest.mark.parametrize(
    ("shape", "dtype", "remedy"),
    [
        ((8, 9, 3), np.uint8, "torch.from_numpy(image).permute(2, 0, 1) / 255"),
        ((8, 9, 3), np.uint16, "torch.from_numpy(image).permute(2, 0, 1).float() / 65535"),
        ((8, 9, 3), np.float64, "torch.from_numpy(image).permute(2, 0, 1).float()"),
        ((3, 8, 9), np.uint8, "torch.from_numpy(image) / 255"),
        ((3, 3, 3), np.uint8, "torch.from_numpy(image).permute(2, 0, 1) / 255"),
        ((8, 9, 4), np.uint8, "torch.from_numpy(image[..., :3]).permute(2, 0, 1) / 255"),
        ((8, 9), np.float32, "torch.from_numpy(image).expand(3, -1, -1).float()"),
    ],
    ids=str,
)
def test_an_array_is_refused_with_what_makes_an_image_of_it(shape, dtype, remedy):
    image = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    with pytest.raises(TypeError) as error:
        restore_image(Identity(), image)
    assert f"an array of shape {shape} and dtype {np.dtype(dtype)}: pass a float tensor (3, H, W)" in str(error.value)
    assert f"here {remedy}. Of an array of OpenCV" in str(error.value)
    restored = restore_image(Identity(), eval(remedy, {"torch": torch, "image": image}))
    assert restored.shape == (3, *(shape[1:] if shape[0] == 3 != shape[-1] else shape[:2]))


def test_what_is_no_image_is_refused_by_its_type():
    for image, kind in (("photo.png", "str"), (Image.new("RGB", (8, 8)), "Image"), ([[0.5]], "list")):
        with pytest.raises(
            TypeError, match=rf"of type {kind}: pass .* such as colora_peft\.images\.read_image\(path\)"
        ):
            restore_image(Identity(), image)
