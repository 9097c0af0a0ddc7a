"""Dtypes, memory layouts, files, and the other ways in: PEFT's injection and transformers' own methods."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from support.tiny_networks import Restorer, network
from torch import nn

from colora_peft import CoLoRAConfig, CoLoRALayer


@pytest.mark.parametrize("ranks", [1, 1000], ids=["factors", "dense"])
def test_channels_last_saves_and_reloads(ranks, tmp_path):
    bare, x = network()
    model = get_peft_model(copy.deepcopy(bare), CoLoRAConfig(ranks=ranks, init_weights=False)).eval()
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path).eval()
    torch.testing.assert_close(loaded(x), expected, rtol=0, atol=1e-6)


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
