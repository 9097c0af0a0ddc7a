"""Outputs of networks, sizes that they do not take as they are, and messages about those that do not fit."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from support.padding import check_reflection
from support.transformers import tiny_swin2sr
from torch import nn

from colora_peft import CoLoRAConfig
from colora_peft.inference.network import (
    needed_multiple,
    reconstruct,
    restoration_loss,
    tile_multiple,
)
from colora_peft.utils import pad_to_multiple, reflected_indices


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


@pytest.mark.parametrize("size", [(8, 8), (7, 6), (1, 5), (9, 16)])
@pytest.mark.parametrize("multiple", [1, 2, 8])
def test_padding_keeps_the_image_and_adds_what_is_in_it(size, multiple):
    x = torch.rand(2, 3, *size)
    padded = pad_to_multiple(x, multiple)
    height, width = padded.shape[-2:]
    assert height % multiple == width % multiple == 0
    assert size[0] <= height < size[0] + multiple and size[1] <= width < size[1] + multiple
    assert torch.equal(padded[..., : size[0], : size[1]], x)
    assert set(padded.flatten().tolist()) == set(x.flatten().tolist())


@pytest.mark.parametrize(("height", "width"), [(1, 2), (5, 16), (20, 9)])
def test_padding_is_by_reflection(height, width):
    check_reflection(pad_to_multiple, height, width)


def test_reflection_is_torchs_as_far_as_that_reaches_and_goes_on():
    line = torch.rand(1, 1, 7)
    assert torch.equal(line[..., reflected_indices(0, 13, 7)], F.pad(line, (0, 6), mode="reflect"))
    assert reflected_indices(0, 10, 3).tolist() == [0, 1, 2, 1, 0, 1, 2, 1, 0, 1]
    assert reflected_indices(2, 5, 1).tolist() == [0, 0, 0]


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (1, 3, 8, 8), (3, 8, 8), (2, 3, 4, 8)])
def test_labels_of_another_shape_are_refused_and_not_repeated(shape):
    batch = {"pixel_values": torch.rand(2, 3, 8, 8), "labels": torch.rand(shape)}
    with pytest.raises(ValueError, match=r"shape of the restored images \(2, 3, 8, 8\), got"):
        restoration_loss(nn.Identity(), batch)
