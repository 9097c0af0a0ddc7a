"""What networks return, sizes that they do not take as they are, and what is said of those that do not fit."""

import pytest
import torch
import torch.nn.functional as F
from support.transformers import tiny_swin2sr
from torch import nn

from colora_peft.inference.network import reconstruct, size_multiple


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
    network.size_multiple = 2
    whole = F.pad(x, (0, 1, 0, 1), mode="reflect")
    assert torch.equal(reconstruct(network, x), network(whole)[..., :7, :9])
    assert torch.equal(reconstruct(network, whole), network(whole))  # nothing is added to what fits


def test_the_multiple_is_found_through_wrappers():
    from peft import get_peft_model

    from colora_peft import CoLoRAConfig

    network = Halves()
    assert size_multiple(network) == 1
    network.size_multiple = 4
    assert size_multiple(get_peft_model(network, CoLoRAConfig(ranks=1))) == 4
    swin2sr = tiny_swin2sr()
    assert size_multiple(swin2sr) == swin2sr.config.window_size == 4
    assert size_multiple(get_peft_model(swin2sr, CoLoRAConfig(ranks=1))) == 4


def test_a_network_that_enlarges_is_told_what_to_do():
    with pytest.raises(ValueError, match="must keep the shape. It enlarges 2 times: .*`upscale=1`.*loss of your own"):
        reconstruct(tiny_swin2sr(), images(16, 12))


def test_a_network_that_returns_something_else_is_named():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(TypeError, match="Pair returned tuple.*`reconstruction`"):
        reconstruct(Pair(), images(4, 4))


def test_the_multiple_is_found_in_a_compiled_and_in_a_shared_out_network():
    network = Halves()
    network.size_multiple = 4
    shared_out = torch.nn.parallel.DistributedDataParallel.__new__(torch.nn.parallel.DistributedDataParallel)
    nn.Module.__init__(shared_out)  # it would ask for other processes
    shared_out.module = network
    for each in (torch.compile(network), shared_out, torch.compile(shared_out)):
        assert size_multiple(each) == 4
