"""PEFT's own test matrix, files: what is saved, and every way to load it."""

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft import utils as peft_utils
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from support.contract_networks import (
    ROWS,
    all_rows,
    assert_same,
    far,
    few_rows,
    of_adapter,
    run,
    since,
    train,
    trainable,
    tuner_layers,
)

from colora_peft import CoLoRAConfig, load_backbone


@all_rows
@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}], ids=["plain", "low_memory"])
def test_loaded_network_is_the_saved_one_frozen_and_in_evaluation_mode(row, options, tmp_path, recwarn):
    model = train(row.adapted(), row.x())
    model.save_pretrained(tmp_path)
    torch.manual_seed(54321)
    loaded = PeftModel.from_pretrained(row.bare().train(), tmp_path, **options)
    assert_same(model.state_dict(), loaded.state_dict())
    assert torch.equal(run(loaded, row.x()), run(model, row.x()))
    assert not any(module.training for module in loaded.modules()) and not trainable(loaded)
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    assert not any("missing" in str(warning.message) for warning in recwarn)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_an_adapter_of_many_layers_can_be_loaded_saved_and_loaded_again(tiny_nafnet, tmp_path, is_trainable):
    """PEFT shortens the names of 20 targets and more to suffixes, which layers of rank 0 have, too."""
    torch.manual_seed(0)
    config = CoLoRAConfig(parameter_budget=0.2, init_weights=False)
    model = get_peft_model(load_backbone(str(tiny_nafnet)), config)
    assert len(config.target_modules) >= 20 and 0 in config.ranks.values()
    model.save_pretrained(tmp_path / "once")
    again = PeftModel.from_pretrained(load_backbone(str(tiny_nafnet)), tmp_path / "once", is_trainable=is_trainable)
    again.save_pretrained(tmp_path / "twice")
    loaded = PeftModel.from_pretrained(load_backbone(str(tiny_nafnet)), tmp_path / "twice")
    assert_same(model.state_dict(), loaded.state_dict())


@few_rows
def test_configuration_given_at_loading_is_the_one_that_counts(row, tmp_path):
    model = row.adapted()
    model.save_pretrained(tmp_path)
    config = row.config(ranks=model.peft_config["default"].ranks, colora_alpha=32.0)
    loaded = PeftModel.from_pretrained(row.bare(), tmp_path, config=config)
    assert loaded.peft_config["default"] is config and config.inference_mode
    for layer, saved in zip(tuner_layers(loaded), tuner_layers(model), strict=True):
        torch.testing.assert_close(layer.get_delta_weight("default"), 2 * saved.get_delta_weight("default"))


# Before, the file of an adapter held those of the others, too.
@since("0.20")
@few_rows
def test_save_writes_the_selected_adapter_alone(row, tmp_path):
    names = ("default", "default2", "other_default", "foodefault_bar", "efaul")
    model = row.adapted(*names)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    expected = get_peft_model_state_dict(model, adapter_name="default")
    assert_same(expected, load_file(tmp_path / "adapter_model.safetensors"))
    assert len(expected) == len(of_adapter(model, "default"))
    model.save_pretrained(tmp_path / "all")
    for name in names[1:]:
        saved = load_file(tmp_path / "all" / name / "adapter_model.safetensors")
        assert_same(get_peft_model_state_dict(model, adapter_name=name), saved)


@few_rows
def test_pickled_weights_load_too(row, tmp_path):
    model = row.adapted()
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    assert_same(model.state_dict(), PeftModel.from_pretrained(row.bare(), tmp_path).state_dict())


@few_rows
@pytest.mark.parametrize("low_memory", [False, True])
def test_one_file_loads_under_several_names(row, low_memory, tmp_path):
    model = row.adapted()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(row.bare(), tmp_path)
    for name in ("other", "yet-another"):
        result = loaded.load_adapter(tmp_path, name, low_cpu_mem_usage=low_memory)
        assert result.missing_keys == [] and result.unexpected_keys == []
        assert loaded.active_adapters == ["default"]
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    for name in ("default", "other", "yet-another"):
        loaded.set_adapter(name)
        assert torch.equal(run(loaded, row.x()), run(model, row.x()))


@all_rows
def test_injection_on_the_meta_device_is_filled_by_the_weights(row):
    source = inject_adapter_in_model(row.config(), row.bare())
    target = inject_adapter_in_model(row.config(), row.bare(), low_cpu_mem_usage=True)
    assert {p.is_meta for name, p in target.named_parameters() if ".colora_" in name} == {True}
    result = set_peft_model_state_dict(target, get_peft_model_state_dict(source), low_cpu_mem_usage=True)
    assert not result.unexpected_keys
    assert_same(source.state_dict(), target.state_dict())
    assert torch.equal(run(target, row.x()), run(source, row.x()))


@few_rows
@pytest.mark.parametrize("is_trainable", [False, True])
def test_loaded_adapters_are_trainable_if_asked_for(row, is_trainable, tmp_path):
    row.adapted().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(row.bare(), tmp_path, is_trainable=is_trainable)
    expected = of_adapter(model, "default") if is_trainable else set()
    assert trainable(model) == expected and model.training is is_trainable
    model.load_adapter(tmp_path, "other", is_trainable=is_trainable)
    # Newer PEFT lets the second adapter require gradients, too, though it is not active.
    assert trainable(model) - of_adapter(model, "other") == expected
    assert is_trainable or not trainable(model)


@few_rows
def test_state_dict_of_one_network_loads_into_another(row):
    source, target = row.adapted("haze", "rain"), row.adapted("haze", "rain", seed=9)
    assert far(run(source, row.x()), run(target, row.x()))
    target.load_state_dict(source.state_dict())
    for name in ("haze", "rain"):
        source.set_adapter(name)
        target.set_adapter(name)
        assert torch.equal(run(source, row.x()), run(target, row.x()))


@pytest.mark.parametrize("existing", [True, False])
def test_model_card_is_filled_or_completed(existing, tmp_path):
    if existing:
        (tmp_path / "README.md").write_text("---\nmeta: hello\n---\nThis is my card\n")
    ROWS[0].adapted().save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "library_name: peft" in card
    assert ("meta: hello" in card and "This is my card" in card) if existing else len(card) > 1000


def test_exclusion_without_effect_is_reported():
    with pytest.warns(UserWarning, match="no modules were excluded"):
        get_peft_model(ROWS[0].bare(), ROWS[0].config(exclude_modules=["nothing"]))


@since("0.21")
@few_rows
def test_base_state_dict_is_read_and_written_under_the_original_names(row):
    bare, model = row.bare(), row.adapted()
    assert_same(bare.state_dict(), peft_utils.get_base_model_state_dict(model))
    adapter = {name: model.state_dict()[name].clone() for name in of_adapter(model, "default")}
    with torch.no_grad():
        for parameter in model.get_base_model().parameters():
            parameter.add_(0.1)
    result = peft_utils.set_base_model_state_dict(model, bare.state_dict(), strict=False)
    assert not result.missing_keys and not result.unexpected_keys
    assert_same(bare.state_dict(), peft_utils.get_base_model_state_dict(model))
    assert all(not torch.equal(model.state_dict()[name], tensor) for name, tensor in adapter.items())
