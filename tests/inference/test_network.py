"""What networks return, sizes that they do not take as they are, and what is said of those that do not fit."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from support.transformers import tiny_swin2sr
from torch import nn

from colora_peft import CoLoRAConfig
from colora_peft.inference.network import needed_multiple, reconstruct, tile_multiple


class Halves(nn.Module):
    """Runs at half the resolution, so that it needs even sizes; `kernel` says what it does there."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 2, stride=2)

    def forward(self, x):
        return F.interpolate(self.conv(x), scale_factor=2)


def images(*size):
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))


def test_a_network_of_even_sizes_restores_odd_ones_as_the_even_ones_around_them():
    network, x = Halves(), images(7, 9)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 6, 8\) for inputs of shape \(2, 3, 7, 9\)"):
        reconstruct(network, x)
    network.needs_multiple_of = 2
    whole = F.pad(x, (0, 1, 0, 1), mode="reflect")
    assert torch.equal(reconstruct(network, x), network(whole)[..., :7, :9])
    assert torch.equal(reconstruct(network, whole), network(whole))  # nothing is added to what fits


@pytest.mark.parametrize("name", ["needs_multiple_of", "size_multiple"])  # the second is that of earlier versions
def test_the_needed_multiple_is_read_from_the_network_inside(name):
    network = Halves()
    assert needed_multiple(network) == 1
    setattr(network, name, 4)
    model = get_peft_model(network, CoLoRAConfig(ranks=1))
    assert needed_multiple(network) == needed_multiple(model) == needed_multiple(torch.compile(model)) == 4
    swin2sr = tiny_swin2sr()
    assert needed_multiple(swin2sr) == needed_multiple(get_peft_model(swin2sr, CoLoRAConfig(ranks=1))) == 4


@pytest.mark.parametrize("name", ["pads_to_multiple", "size_multiple"])
def test_tiles_are_cut_at_what_a_network_needs_and_what_it_pads_to(name):
    network = Halves()
    assert tile_multiple(network) == 1
    network.needs_multiple_of, network.config = 4, SimpleNamespace(**{name: 6})
    assert tile_multiple(network) == 12


def test_a_network_that_enlarges_is_told_what_to_do():
    with pytest.raises(ValueError, match="must keep the shape. It enlarges 2 times: .*`upscale=1`.*loss of your own"):
        reconstruct(tiny_swin2sr(), images(16, 12))


def test_a_network_that_returns_something_else_is_named():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(TypeError, match="Pair returned tuple.*`reconstruction`"):
        reconstruct(Pair(), images(4, 4))
