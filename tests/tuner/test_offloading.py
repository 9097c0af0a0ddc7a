"""Layers whose weights Accelerate keeps elsewhere: what runs is right, what cannot is said before anything changes."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from peft import get_peft_model
from support.tiny_networks import network
from torch import nn

from colora_peft import (
    CoLoRAConfig,
    CoLoRALayer,
    hotswap_adapter,
    prepare_model_for_compiled_hotswap,
    rename_adapter,
    save_as_lora,
)
from colora_peft.tuner.functional import run_with_weight
from colora_peft.tuner.offloading import is_offloaded, onloaded


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


@torch.no_grad()
def test_a_merged_and_offloaded_network_is_not_run_disabled_and_stays_whole():
    bare, x = network()
    bare.eval()
    model = get_peft_model(copy.deepcopy(bare), CoLoRAConfig(ranks=1, init_weights=False)).eval()
    expected = model(x)
    cpu_offload(model, execution_device=torch.device("cpu"))
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
    with pytest.raises(NotImplementedError, match="unmerge_adapter"), model.disable_adapter():
        model(x)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(x), bare(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)


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


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("hotswap_adapter", lambda model, folder: hotswap_adapter(model, folder / "haze", "haze")),
        ("prepare_model_for_compiled_hotswap", lambda model, _: prepare_model_for_compiled_hotswap(model)),
        ("rename_adapter", lambda model, _: rename_adapter(model, "haze", "fog")),
        ("add_weighted_adapter", lambda model, _: model.add_weighted_adapter(["haze"], [2.0], "more")),
        ("save_as_lora", lambda model, folder: save_as_lora(folder / "lora", model, "haze")),
    ],
)
def test_what_needs_all_weights_is_refused_before_anything_is_changed(name, call, tmp_path):
    bare, x = network()
    model = get_peft_model(bare, CoLoRAConfig(ranks=1, init_weights=False), "haze").eval()
    model.save_pretrained(tmp_path)
    expected = model(x)
    cpu_offload(model, execution_device=torch.device("cpu"))
    names = set(model.state_dict())
    with pytest.raises(ValueError, match=f"{name} needs all weights in memory, but .*conv.* offloaded"):
        call(model, tmp_path)
    assert set(model.state_dict()) == names and list(model.peft_config) == ["haze"]
    assert not (tmp_path / "lora").exists()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)


def test_weights_go_away_again_where_bringing_the_next_ones_fails():
    layers = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 3))
    cpu_offload(layers, execution_device=torch.device("cpu"))
    layers[1]._hf_hook.weights_map = None
    with pytest.raises(TypeError), onloaded(layers):
        pass
    assert layers[0].weight.is_meta
