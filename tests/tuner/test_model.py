"""Adapters under a budget and with trained biases, and two adapters; test_contract.py has PEFT's own matrix."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from support.tiny_networks import NETWORKS, network, trained

from colora_peft import CoLoRAConfig, CoLoRALayer, adaptable_layers, adapter_parameters, weight_matrix_shape
from colora_peft.tuner.peft_internals import SAVES_BIASES

SETTINGS = {"budget": {"parameter_budget": 0.4}}
if SAVES_BIASES:
    SETTINGS["all_biases"] = {"ranks": 2, "bias": "all"}
    SETTINGS["own_biases"] = {"ranks": 2, "bias": "colora_only"}


@pytest.fixture(params=[(name, settings) for name in NETWORKS for settings in SETTINGS], ids="-".join)
def case(request):
    """(bare network, the same adapted, input, settings)."""
    name, settings = request.param
    bare, x = network(name)
    bare.eval()
    return bare, get_peft_model(copy.deepcopy(bare), CoLoRAConfig(**SETTINGS[settings])).eval(), x, SETTINGS[settings]


# --- the contract -----------------------------------------------------------------------------------------------


def test_only_adapter_and_asked_biases_move(case):
    _, model, x, settings = case
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trained(model, x)
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        is_bias = name.endswith("bias") and settings.get("bias", "none") != "none"
        if settings.get("bias") == "colora_only":
            is_bias = name.endswith("base_layer.bias")
        assert parameter.requires_grad == (".colora_" in name or is_bias), name
        assert moved == parameter.requires_grad or ".colora_A." in name, name


def test_reload_under_another_seed_gives_equal_outputs(case, tmp_path):
    bare, model, x, settings = case
    expected = trained(model, x)(x)
    model.save_pretrained(tmp_path)
    torch.manual_seed(77)
    loaded = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path).eval()
    torch.testing.assert_close(loaded(x), expected, rtol=0, atol=1e-6)
    assert not any(p.requires_grad for name, p in loaded.named_parameters() if not name.endswith("bias"))
    assert loaded.peft_config["default"].ranks == model.peft_config["default"].ranks
    low_memory = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path, low_cpu_mem_usage=True).eval()
    torch.testing.assert_close(low_memory(x), expected, rtol=0, atol=1e-6)


def test_file_holds_the_adapter_alone(case, tmp_path):
    _, model, x, settings = case
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    adapter = {name: tensor for name, tensor in weights.items() if ".colora_" in name}
    assert settings.get("bias", "none") != "none" or len(adapter) == len(weights)
    shapes = {name: weight_matrix_shape(layer) for name, layer in adaptable_layers(model.get_base_model()).items()}
    ranks = model.peft_config["default"].ranks
    expected = sum(adapter_parameters(rank, *shapes[name]) for name, rank in ranks.items())
    assert sum(tensor.numel() for tensor in adapter.values()) == expected
    assert not any("default" in name for name in weights)


def test_merging_keeps_the_output(case):
    bare, model, x, settings = case
    expected = trained(model, x)(x)
    assert not torch.allclose(expected, bare(x), atol=1e-4)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
    merged = model.merge_and_unload()
    assert type(merged) is type(bare) and not any(isinstance(m, CoLoRALayer) for m in merged.modules())
    assert merged.state_dict().keys() == bare.state_dict().keys()
    torch.testing.assert_close(merged(x), expected, rtol=0, atol=1e-5)


# --- several adapters -------------------------------------------------------------------------------------------


@pytest.fixture
def two():
    """(bare, model with adapters `haze` on all but `up` and `rain` with other ranks on other layers, input)."""
    bare, x = network()
    model = get_peft_model(
        copy.deepcopy(bare), CoLoRAConfig(ranks=1, init_weights=False, exclude_modules=["up"]), "haze"
    )
    rain = CoLoRAConfig(ranks={"conv": 2, "up": 1000, "head": 0, "blocks.0.conv": 1000}, init_weights=False)
    model.add_adapter("rain", rain)
    return bare.eval(), model.eval(), x


def test_second_adapter_reaches_wrapped_and_unwrapped_layers(two, tmp_path):
    bare, model, x = two
    assert model.peft_config["rain"].ranks == {"conv": 2, "blocks.0.conv": 8, "up": 8, "head": 0}
    with_haze = model(x)
    model.set_adapter("rain")
    with_rain = model(x)
    model.base_model.set_adapter(["haze", "rain"])
    both = model(x)
    assert not any(
        torch.allclose(p, q, atol=1e-4) for p, q in [(with_haze, with_rain), (with_haze, both), (with_rain, both)]
    )
    model.merge_adapter()
    torch.testing.assert_close(model(x), both, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    for name, expected in (("haze", with_haze), ("rain", with_rain)):
        loaded = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path / name).eval()
        torch.testing.assert_close(loaded(x), expected, rtol=0, atol=1e-6)


def test_adapters_loaded_into_one_network_switch(two, tmp_path):
    bare, model, x = two
    expected = {name: (model.set_adapter(name), model(x))[1] for name in ("haze", "rain")}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path / "haze", adapter_name="haze")
    loaded.load_adapter(tmp_path / "rain", "rain")
    loaded.eval()
    for name in ("haze", "rain", "haze"):
        loaded.set_adapter(name)
        torch.testing.assert_close(loaded(x), expected[name], rtol=0, atol=1e-6)


def test_deleting_cleans_up(two):
    bare, model, x = two
    model.set_adapter("rain")
    with_rain = model(x)
    model.delete_adapter("haze")
    assert not any(name.endswith(".haze") for name in model.state_dict())
    assert torch.equal(model(x), with_rain) and list(model.peft_config) == ["rain"]
    model.delete_adapter("rain")
    assert torch.equal(model.base_model(x), bare(x))  # PeftModel itself cannot be called without an adapter
    assert not any("colora_" in name for name in model.state_dict())


def test_refused_adapter_leaves_the_network_as_it_was(two):
    _, model, x = two
    before, names = model(x), set(model.state_dict())
    with pytest.raises(ValueError, match="'tail'"):
        model.add_adapter("blur", CoLoRAConfig(ranks={"conv": 1, "tail": 1}))
    assert list(model.peft_config) == ["haze", "rain"]
    assert set(model.state_dict()) == names and torch.equal(model(x), before)
