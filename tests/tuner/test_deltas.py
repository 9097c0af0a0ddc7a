"""Names and strengths of the deltas in one layer, and PEFT's own conversion to LoRA."""

import copy

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from support.tiny_networks import network
from torch import nn

from colora_peft import CoLoRAConfig, CoLoRALayer


def adapted(**settings):
    bare, x = network()
    model = get_peft_model(copy.deepcopy(bare), CoLoRAConfig(init_weights=False, **settings)).eval()
    return bare.eval(), model, x


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, CoLoRALayer)]


@pytest.mark.parametrize("ranks", [1, 1000], ids=["factors", "dense"])
def test_scales_are_factors_of_the_trained_delta(ranks):
    _, model, _ = adapted(ranks=ranks)
    for layer in layers_of(model):
        trained = layer.get_delta_weight("default")
        for change, factor in [
            (lambda layer: layer.set_scale("default", 0.5), 0.5),
            (lambda layer: layer.scale_layer(3.0), 1.5),
            (lambda layer: layer.set_scale("default", 2.0), 2.0),
            (lambda layer: layer.scale_layer(0.5), 1.0),
            (lambda layer: layer.scale_layer(4.0), 4.0),
            (lambda layer: layer.unscale_layer(2.0), 2.0),
            (lambda layer: layer.unscale_layer(), 1.0),
            (lambda layer: layer.set_scale("no such adapter", 7.0), 1.0),
        ]:
            change(layer)
            torch.testing.assert_close(layer.get_delta_weight("default"), factor * trained)


def test_a_scale_changes_the_output_at_once_and_zero_is_the_base():
    bare, model, x = adapted(ranks=1)
    expected = model(x)
    for layer in layers_of(model):
        layer.set_scale("default", 0.0)
    assert torch.equal(model(x), bare(x))
    for layer in layers_of(model):
        layer.unscale_layer()
    assert torch.equal(model(x), expected)


def test_a_merged_adapter_is_not_scaled():
    _, model, _ = adapted(ranks=1)
    model.merge_adapter()
    for layer in layers_of(model):
        for change in (lambda layer: layer.set_scale("default", 2.0), lambda layer: layer.scale_layer(2.0)):
            with pytest.raises(ValueError, match="'default' is merged: call unmerge_adapter"):
                change(layer)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        # The first name is a suffix of the second one's, which PEFT's matching would confuse.
        self.last = nn.Linear(10, 4)
        self.inner = nn.ModuleDict({"last": nn.Linear(12, 10)})

    def forward(self, x):
        return self.last(torch.relu(self.inner["last"](x)))


converts = pytest.mark.skipif(not hasattr(peft, "convert_to_lora"), reason="this PEFT does not convert to LoRA yet")


@converts
@pytest.mark.parametrize("settings", [{"parameter_budget": 0.5}, {"target_modules": ["last"], "ranks": 2}], ids=str)
@pytest.mark.parametrize("rank", [4, 0.999999])
def test_pefts_own_conversion_of_linear_layers(settings, rank, tmp_path):
    torch.manual_seed(0)
    bare, x = Mlp().eval(), torch.randn(3, 12)
    model = get_peft_model(copy.deepcopy(bare), CoLoRAConfig(init_weights=False, **settings)).eval()
    peft.tuners.lora.save_as_lora(tmp_path, model, rank=rank)
    lora = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path).eval()
    assert lora.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(lora(x), model(x), rtol=0, atol=1e-3 if isinstance(rank, float) else 1e-5)
    assert not torch.allclose(model(x), bare(x), atol=1e-2)


@converts
def test_pefts_own_conversion_refuses_convolutions():
    _, model, _ = adapted(ranks=1)
    with pytest.raises(TypeError, match="CoLoRALayer"):
        peft.convert_to_lora(model, rank=2)


def test_a_scaling_by_zero_is_not_divided_out():
    layer = CoLoRALayer(nn.Linear(4, 4))
    layer.update_layer("default", 1, 1.0)
    layer.set_adapter("default")
    with pytest.raises(ValueError, match="unscale_layer.. undoes all"):
        layer.unscale_layer(0)
