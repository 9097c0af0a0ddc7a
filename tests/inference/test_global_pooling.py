"""colora_peft/inference/global_pooling.py: what is gathered tile by tile is the mean over the image."""

import pytest
import torch
from torch import nn

from colora_peft import restore_image
from colora_peft.inference.global_pooling import ImageStatistics


class Products(nn.Module):
    """Mean over the pixels of the products of all channels of two maps, as transposed attention needs them."""

    averages_over_pixels = True

    def forward(self, queries, keys):
        return torch.einsum("bihw,bjhw->bij", queries, keys) / queries[0, 0].numel()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.products = Products()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        half = x[..., ::2, ::2]
        return torch.einsum("bij,bjhw->bihw", self.products(half, half.square()), x) * self.pool(x)


def cores(x, columns):
    """Two tiles of 8 x 12 that overlap by 4 columns, and their parts of the image of 8 x 20."""
    return torch.cat([x[..., :12], x[..., 8:]]), [((0, 8), (0, columns)), ((0, 8), (columns - 8, 12))]


@pytest.mark.parametrize("columns", [8, 10, 12])
@torch.no_grad()
def test_tiles_then_see_the_means_of_the_image(columns):
    model, x = Attention(), torch.rand(1, 3, 8, 20)
    tiles, own = cores(x, columns)
    whole, plain = model(x), model(tiles)
    statistics = ImageStatistics(model)
    with statistics.attached():
        statistics.begin_batch((8, 12), own)
        model(tiles)
        statistics.finish_pass()
        statistics.begin_batch((8, 12), None)
        restored = model(tiles)
    # Neither mean depends on the other here: one pass is exact.
    torch.testing.assert_close(restored[:1], whole[..., :12])
    torch.testing.assert_close(restored[1:], whole[..., 8:])
    assert not torch.allclose(plain[:1], whole[..., :12], rtol=1e-2)
    assert torch.equal(model(tiles), plain) and not any(module._forward_hooks for module in model.modules())


@torch.no_grad()
def test_tiles_one_by_one_or_together_are_the_same():
    model, x = Attention(), torch.rand(1, 3, 8, 20)
    tiles, own = cores(x, 10)
    statistics = ImageStatistics(model)
    with statistics.attached():
        for tile, core in zip(tiles.split(1), own, strict=True):
            statistics.begin_batch((8, 12), [core])
            model(tile)
        statistics.finish_pass()
        statistics.begin_batch((8, 12), None)
        restored = model(tiles)
    torch.testing.assert_close(restored[1:], model(x)[..., 8:])


@torch.no_grad()
def test_the_first_pass_uses_what_it_has_seen_so_far():
    model, x = nn.AdaptiveAvgPool2d(1), torch.rand(1, 3, 8, 20)
    tiles, own = cores(x, 10)
    parts = x[..., :10].mean((2, 3), keepdim=True), x[..., 10:].mean((2, 3), keepdim=True)
    statistics = ImageStatistics(model)
    with statistics.attached():
        for passes in range(2):
            for number, (tile, core) in enumerate(zip(tiles.split(1), own, strict=True)):
                statistics.begin_batch((8, 12), [core])
                expected = parts[0] if (passes, number) == (0, 0) else (parts[0] + parts[1]) / 2
                torch.testing.assert_close(model(tile), expected)
            statistics.finish_pass()


@torch.no_grad()
@pytest.mark.parametrize("model", [nn.Conv2d(3, 3, 1), Attention()], ids=["pools nothing", "pools"])
def test_a_layer_that_is_left_over_and_never_runs_is_left_alone(model):
    x = torch.rand(3, 24, 40)
    expected = restore_image(model, x, tile=24, overlap=8)
    model.left_over = nn.AdaptiveAvgPool2d(1)
    assert ImageStatistics(model).needed
    assert torch.equal(restore_image(model, x, tile=24, overlap=8), expected)


def test_layers_of_a_compiled_network_that_are_never_seen_are_an_error():
    statistics = ImageStatistics(torch.compile(Attention()))
    assert statistics.needed and not ImageStatistics(nn.Conv2d(3, 3, 1)).needed
    with pytest.raises(RuntimeError, match="was seen at work, since it is compiled"):
        statistics.finish_pass()
