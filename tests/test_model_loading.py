"""Dtypes, memory layouts, files, and the other ways in: PEFT's injection and transformers' own methods."""

import copy
import json
import subprocess
import sys
import warnings

import peft
import pytest
import torch
from packaging.version import Version
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from tiny_networks import Restorer, network, trained
from torch import nn

from colora_peft import CoLoRAConfig, CoLoRALayer


@pytest.mark.parametrize("ranks", [1, 1000], ids=["factors", "dense"])
def test_half_precision_base_has_float32_adapters(ranks, tmp_path):
    bare, x = network()
    bare, x = bare.to(torch.bfloat16), x.to(torch.bfloat16)
    model = get_peft_model(copy.deepcopy(bare), CoLoRAConfig(ranks=ranks))
    assert torch.equal(model(x), bare(x))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    expected = trained(model, x)(x)
    assert expected.dtype == torch.bfloat16 and not torch.equal(expected, bare(x))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path).eval()
    assert torch.equal(loaded(x), expected)
    assert torch.equal(model.merge_and_unload()(x), expected)
    same = get_peft_model(copy.deepcopy(bare), CoLoRAConfig(ranks=ranks), autocast_adapter_dtype=False)
    assert {p.dtype for p in same.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("ranks", [1, 1000], ids=["factors", "dense"])
def test_channels_last_saves_and_reloads(ranks, tmp_path):
    bare, x = network()
    model = get_peft_model(copy.deepcopy(bare), CoLoRAConfig(ranks=ranks, init_weights=False)).eval()
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path).eval()
    torch.testing.assert_close(loaded(x), expected, rtol=0, atol=1e-6)


def test_modules_to_save_are_trained_and_saved(tmp_path):
    bare, x = network()
    model = get_peft_model(copy.deepcopy(bare), CoLoRAConfig(ranks=1, modules_to_save=["head"]))
    expected = trained(model, x)(x)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path).eval()
    torch.testing.assert_close(loaded(x), expected, rtol=0, atol=1e-6)
    assert not torch.equal(loaded.base_model.model.head.modules_to_save["default"].weight, bare.head.weight)


def test_injection_without_a_peft_model():
    bare, x = network()
    config = CoLoRAConfig(ranks=2, init_weights=False)
    model = inject_adapter_in_model(config, copy.deepcopy(bare))
    weights = get_peft_model_state_dict(model)
    other = inject_adapter_in_model(CoLoRAConfig(ranks=config.ranks), copy.deepcopy(bare))
    result = set_peft_model_state_dict(other, weights)
    assert not result.unexpected_keys and type(other) is Restorer
    assert torch.equal(other(x), model(x)) and not torch.equal(other(x), bare(x))


def test_injection_after_a_state_dict_agrees_with_the_ranks():
    bare, x = network()
    config = CoLoRAConfig(ranks={"conv": 2, "head": 0}, init_weights=False)
    weights = get_peft_model_state_dict(inject_adapter_in_model(config, copy.deepcopy(bare)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = inject_adapter_in_model(copy.deepcopy(config), copy.deepcopy(bare), state_dict=weights)
    assert isinstance(model.conv, CoLoRALayer) and type(model.head) is nn.Conv2d


def test_weights_of_other_shapes_are_refused_by_name(tmp_path):
    bare, _ = network()
    get_peft_model(copy.deepcopy(bare), CoLoRAConfig(ranks={"conv": 1})).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "ranks": {"conv": 2}}))
    with pytest.raises(RuntimeError, match="conv.colora_A"):
        PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path)


def test_gradient_checkpointing_and_plain_training_agree():
    bare, x = network()
    gradients = []
    for checkpointed in (False, True):
        model = get_peft_model(copy.deepcopy(bare), CoLoRAConfig(ranks=2, init_weights=False, target_modules=["mix"]))
        torch.manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_()
        if checkpointed:
            for block in model.get_base_model().blocks:
                run = block.forward
                block.forward = lambda x, run=run: torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_fresh_process_needs_one_import(tmp_path):
    torch.manual_seed(0)
    bare, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 1)), torch.rand(1, 3, 6, 6)
    model = get_peft_model(copy.deepcopy(bare), CoLoRAConfig(parameter_budget=0.6, init_weights=False))
    model.save_pretrained(tmp_path)
    save_file({**bare.state_dict(), "x": x, "y": model(x).detach()}, tmp_path / "expected.safetensors")
    program = f"""
import torch, colora_peft
from torch import nn
from peft import PeftModel
from safetensors.torch import load_file
expected = load_file({str(tmp_path / "expected.safetensors")!r})
x, y = expected.pop("x"), expected.pop("y")
bare = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 1))
bare.load_state_dict(expected)
model = PeftModel.from_pretrained(bare, {str(tmp_path)!r})
assert torch.allclose(model(x), y, atol=1e-6)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_transformers_own_adapter_methods():
    from transformers import Swin2SRConfig, Swin2SRForImageSuperResolution
    from transformers.integrations.peft import MIN_PEFT_VERSION

    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"transformers needs peft>={MIN_PEFT_VERSION} for its own adapter methods")

    settings = Swin2SRConfig(image_size=8, embed_dim=8, depths=[2], num_heads=[2], window_size=4, upscale=2)
    torch.manual_seed(0)
    model, x = Swin2SRForImageSuperResolution(settings).eval(), torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        bare = model(x).reconstruction
        model.add_adapter(CoLoRAConfig(parameter_budget=0.3, init_weights=False), "rain")
        model.eval()
        adapted = model(x).reconstruction
        assert not torch.allclose(adapted, bare, atol=1e-4)
        model.disable_adapters()
        assert torch.equal(model(x).reconstruction, bare)
        model.enable_adapters()
        assert torch.equal(model(x).reconstruction, adapted)
        model.add_adapter(CoLoRAConfig(ranks=1), "haze")
        model.set_adapter("haze")
        assert torch.equal(model(x).reconstruction, bare)
        model.set_adapter("rain")
        assert torch.equal(model(x).reconstruction, adapted)
