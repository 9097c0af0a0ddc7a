"""colora_peft/inference/local_pooling.py: laws of local means, and networks under them."""

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from support.tiny_networks import tiny_nafnet, trained
from torch import nn

from colora_peft import CoLoRAConfig
from colora_peft.inference import local_pooling
from colora_peft.inference.local_pooling import pools_locally, sliding_mean


class Gated(nn.Module):
    """A gate of pooled features at full and at half resolution; `head` decides what pooled values go through."""

    def __init__(self, head=None, shared=False):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d((1, 1))
        self.coarse = self.pool if shared else nn.AdaptiveAvgPool2d(1)
        self.unused = nn.AdaptiveAvgPool2d(1)
        self.head = head or nn.Identity()

    def forward(self, x):
        half = F.avg_pool2d(x, 2)
        half = half * self.coarse(half)
        return x * self.head(self.pool(x)) + F.interpolate(half, scale_factor=2)


@pytest.mark.parametrize("window", [(1, 1), (3, 5), (4, 2), (9, 30)])
def test_sliding_mean_is_the_mean_of_the_nearest_window_inside(window):
    x = torch.randn(2, 3, 9, 12, generator=torch.Generator().manual_seed(0))
    rows, columns = (min(each, size) for each, size in zip(window, x.shape[-2:], strict=True))
    expected = torch.empty_like(x)
    for i in range(9):
        for j in range(12):
            top = min(max(i - (rows - 1) // 2, 0), 9 - rows)
            left = min(max(j - (columns - 1) // 2, 0), 12 - columns)
            expected[..., i, j] = x[..., top : top + rows, left : left + columns].mean((2, 3))
    torch.testing.assert_close(sliding_mean(x, *window), expected, rtol=0, atol=1e-6)


def test_sliding_mean_of_a_large_half_precision_map_is_accurate():
    x = 100 + torch.rand(1, 1, 2000, 40, generator=torch.Generator().manual_seed(0))
    exact = sliding_mean(x.double().float(), 24, 24)[0, 0, 1990, 20].item()
    assert exact == pytest.approx(x[0, 0, 1976:2000, 9:33].double().mean().item(), abs=2e-3)
    halved = sliding_mean(x.half(), 24, 24)
    assert halved.dtype == torch.float16 and halved[0, 0, 1990, 20].item() == pytest.approx(exact, abs=0.07)


def adapted():
    model = get_peft_model(tiny_nafnet(), CoLoRAConfig(ranks=2))

    class Images(nn.Module):  # `trained` wants a tensor
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x).reconstruction

    with torch.enable_grad():
        trained(Images(), torch.rand(1, 3, 16, 16))
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("make", [tiny_nafnet, adapted])
@pytest.mark.parametrize("size", [(40, 56), (37, 50)])
def test_a_window_as_large_as_the_image_is_the_network_itself(make, size):
    model, x = make(), torch.rand(1, 3, *size)
    whole = model(x).reconstruction
    with local_pooling(model, window=max(size)):
        assert torch.equal(model(x).reconstruction, whole)
    with local_pooling(model, window=16):
        assert not torch.allclose(model(x).reconstruction, whole, atol=1e-4)
    assert torch.equal(model(x).reconstruction, whole)
    assert not any(module._forward_hooks for module in model.modules())


@torch.no_grad()
def test_windows_follow_the_resolution_of_each_layer():
    x = torch.rand(1, 3, 32, 48)
    half = F.avg_pool2d(x, 2)
    expected = x * sliding_mean(x, 12, 12) + F.interpolate(half * sliding_mean(half, 6, 6), scale_factor=2)
    with local_pooling(model := Gated(), window=12):
        torch.testing.assert_close(model(x), expected)


@torch.no_grad()
def test_what_lies_further_than_the_window_makes_no_difference():
    model, x = Gated(), torch.rand(1, 3, 32, 64)
    other = x.clone()
    other[..., 40:] = 0
    with local_pooling(model, window=12):
        assert torch.equal(model(x)[..., :32], model(other)[..., :32])
    assert not torch.allclose(model(x)[..., :32], model(other)[..., :32], atol=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_the_network_is_left_as_it_was_also_after_an_error(training):
    model = tiny_nafnet().train(training)
    with pytest.raises(KeyError), local_pooling(model, window=8):
        assert pools_locally(model) and model.training == training
        raise KeyError
    assert not pools_locally(model) and model.training == training


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Conv2d(3, 3, 1), "Conv2d runs no nn.AdaptiveAvgPool2d"),
        (Gated(shared=True), "pooling layer pool runs at several resolutions"),
        (Gated(nn.Sequential(nn.Flatten(), nn.Linear(3, 3), nn.Unflatten(1, (3, 1, 1)))), "Gated cannot use a map"),
    ],
)
def test_networks_that_cannot_pool_locally_are_refused(model, message):
    with pytest.raises(ValueError, match=message), local_pooling(model, window=8):
        pass
    assert not any(module._forward_hooks for module in model.modules())


def test_windows_that_are_none_and_nested_ones_are_refused():
    model = Gated()
    with pytest.raises(ValueError, match="at least 1 pixel, got 0"), local_pooling(model, window=0):
        pass
    with local_pooling(model, window=8), pytest.raises(ValueError, match="already"), local_pooling(model, window=8):
        pass
