"""Renaming an adapter changes its name and nothing else."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.tiny_networks import network

from colora_peft import CoLoRAConfig, rename_adapter

pytestmark = pytest.mark.usefixtures("grad_mode")


@pytest.fixture
def two():
    """(bare network, model with adapters `haze` and `rain`, input); `haze` is active and trains `head` whole."""
    bare, x = network()
    settings = {"init_weights": False}
    haze = CoLoRAConfig(ranks=1, exclude_modules=["head"], modules_to_save=["head"], **settings)
    model = get_peft_model(copy.deepcopy(bare), haze, "haze")
    model.base_model.model.head.modules_to_save["haze"].weight.data.add_(0.1)
    model.add_adapter("rain", CoLoRAConfig(ranks={"conv": 2, "up": 1000}, **settings))
    return bare.eval(), model.eval(), x


@pytest.mark.parametrize("state", ["active", "inactive", "merged", "disabled"])
def test_outputs_order_and_state_stay(two, state):
    bare, model, x = two
    expected = {name: (model.set_adapter(name), model(x))[1] for name in ("rain", "haze")}
    if state == "inactive":
        model.set_adapter("rain")
    if state == "merged":
        model.merge_adapter()
    if state == "disabled":
        model.base_model.disable_adapter_layers()
    parameters = [(name.replace("haze", "fog"), id(p)) for name, p in model.named_parameters()]
    trained = {name.replace("haze", "fog") for name, p in model.named_parameters() if p.requires_grad}
    rename_adapter(model, "haze", "fog")
    assert list(model.peft_config) == ["fog", "rain"]
    assert model.active_adapter == ("rain" if state == "inactive" else "fog") == model.active_adapters[0]
    assert [(name, id(p)) for name, p in model.named_parameters()] == parameters
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    if state == "merged":
        torch.testing.assert_close(model(x), expected["haze"], rtol=0, atol=1e-5)
        model.unmerge_adapter()
    if state == "disabled":
        assert torch.equal(model(x), bare(x))
        model.base_model.enable_adapter_layers()
    for new, old in (("fog", "haze"), ("rain", "rain")):
        model.set_adapter(new)
        torch.testing.assert_close(model(x), expected[old], rtol=0, atol=1e-5)


def test_the_new_name_is_saved_and_deleted_as_any(two, tmp_path):
    bare, model, x = two
    expected = model(x)
    rename_adapter(model, "haze", "fog")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path / "fog").eval()
    torch.testing.assert_close(loaded(x), expected, rtol=0, atol=1e-6)
    model.delete_adapter("fog")
    assert not any("fog" in name or "haze" in name for name in model.state_dict())


def test_one_of_two_active_adapters(two):
    _, model, x = two
    model.base_model.set_adapter(["rain", "haze"])
    expected = model(x)
    rename_adapter(model, "rain", "drops")
    assert model.base_model.active_adapters == ["drops", "haze"]
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("fog", "mist", "no adapter 'fog' to rename, only haze, rain"),
        ("haze", "rain", "already an adapter 'rain'"),
        ("haze", "v1.5", "'v1.5' cannot be part"),
        ("haze", "", "cannot be part"),
        ("haze", "train", "'train' is that of an attribute"),
    ],
)
def test_bad_names_are_refused(two, old, new, message):
    _, model, x = two
    before, names = model(x), set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        rename_adapter(model, old, new)
    assert list(model.peft_config) == ["haze", "rain"]
    assert set(model.state_dict()) == names and torch.equal(model(x), before)


def test_a_compiled_network_is_renamed_as_any(two):
    _, model, x = two
    expected = model(x)
    compiled = torch.compile(model, backend="eager")
    rename_adapter(compiled, "haze", "fog")
    assert list(model.peft_config) == ["fog", "rain"] and model.active_adapters == ["fog"]
    assert torch.equal(compiled(x), expected)


def test_a_network_without_adapters_is_refused():
    with pytest.raises(TypeError, match="carries no CoLoRA adapters"):
        rename_adapter(network()[0], "haze", "fog")
