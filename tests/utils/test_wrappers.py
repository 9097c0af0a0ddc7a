"""The network inside its wrappers, whatever their order."""

import itertools

import pytest
import torch
from peft import get_peft_model
from torch import nn

from colora_peft import CoLoRAConfig
from colora_peft.utils import is_compiled, unwrapped


def shared_out(network):
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)  # the real one asks for other processes
    wrapper.module = network
    return wrapper


class DeepSpeedEngine(nn.Module):
    """Stands for the real one, which is known by its name."""

    def __init__(self, network):
        super().__init__()
        self.module = network


@pytest.mark.parametrize(("outer", "inner"), itertools.permutations((torch.compile, shared_out, DeepSpeedEngine), 2))
def test_the_network_is_found_inside_any_two_wrappers(outer, inner):
    network = nn.Conv2d(3, 3, 1)
    assert unwrapped(network) is network
    assert unwrapped(outer(inner(network))) is network


def test_an_adapted_network_keeps_its_adapters_when_its_base_is_compiled():
    model = get_peft_model(nn.Sequential(nn.Conv2d(3, 3, 1)), CoLoRAConfig(ranks=1))
    model.base_model.model = torch.compile(model.base_model.model)
    assert unwrapped(model) is model
    assert is_compiled(model) and not is_compiled(nn.Conv2d(3, 3, 1))
