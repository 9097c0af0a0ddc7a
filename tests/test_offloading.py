"""Layers whose weights Accelerate keeps elsewhere: what runs is right, what cannot is said before anything changes."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from peft import get_peft_model
from tiny_networks import network
from torch import nn

from colora_peft import CoLoRAConfig, CoLoRALayer
from colora_peft.offloading import is_offloaded, onloaded
from colora_peft.run_layer import run_with_weight


def test_weights_are_here_inside_and_elsewhere_outside_also_after_an_error():
    layer = nn.Conv2d(4, 6, 3)
    weight = layer.weight.detach().clone()
    cpu_offload(layer, execution_device=torch.device("cpu"))
    assert is_offloaded(layer) and layer.weight.is_meta
    with onloaded(layer):
        assert torch.equal(layer.weight, weight)
    with pytest.raises(ZeroDivisionError), onloaded(layer):
        _ = 1 / 0
    assert layer.weight.is_meta
    assert not is_offloaded(nn.Conv2d(4, 6, 3))


@pytest.mark.parametrize("ranks", [1, 1000], ids=["factors", "dense"])
def test_adapted_network_runs_offloaded_in_every_state(ranks):
    bare, x = network()
    bare.eval()
    model = get_peft_model(copy.deepcopy(bare), CoLoRAConfig(ranks=ranks, init_weights=False)).eval()
    expected = model(x)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)
        with model.disable_adapter():
            torch.testing.assert_close(model(x), bare(x), rtol=0, atol=1e-6)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)


def test_training_on_an_offloaded_network_is_refused_before_anything_is_changed():
    bare, _ = network()
    cpu_offload(bare, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="'conv' is offloaded.*before you dispatch it"):
        get_peft_model(bare, CoLoRAConfig(ranks=1))
    assert not any(isinstance(module, CoLoRALayer) for module in bare.modules())


class ScaledConv(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_an_offloaded_layer_with_its_own_forward_pass_is_named():
    layer = ScaledConv(4, 6, 3)
    weight = layer.weight.detach().clone()
    cpu_offload(layer, execution_device=torch.device("cpu"))
    with pytest.raises(NotImplementedError, match="ScaledConv.*keep it on a device"):
        run_with_weight(layer, weight, torch.rand(1, 4, 5, 5))


def test_a_mixed_batch_through_offloaded_layers_is_refused():
    bare, x = network()
    model = get_peft_model(bare, CoLoRAConfig(ranks=1, init_weights=False), "haze").eval()
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(NotImplementedError, match="offloaded"):
        model(x, adapter_names=["haze", "__base__"])
