"""PEFT's own test matrix, one adapter: names, training, merging, disabling, status.

Each behaviour runs on every kind of layer and on NAFNet, stored as factors and dense, and with `modules_to_save`.
"""

import pickle
from itertools import product

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from support.contract_networks import (
    Row,
    all_rows,
    assert_same,
    far,
    few_rows,
    gradients,
    of_adapter,
    run,
    since,
    train,
    trainable,
    tuner_layers,
    weights,
)

from colora_peft import CoLoRALayer

pytestmark = pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained in the prefix")


# --- names, attributes, what is printed -----------------------------------------------------------------------------


@few_rows
@pytest.mark.parametrize("name", ["rain-1", "def", "first", pytest.param("colora_A", marks=since("0.21"))])
def test_name_of_the_adapter_makes_no_difference(row, name, tmp_path):
    """Also where it is part of another name, of a layer's or of a parameter's."""
    default, other = row.adapted(), row.adapted(name)
    renamed = {key.replace("default", name): tensor for key, tensor in default.state_dict().items()}
    assert_same(renamed, other.state_dict())
    expected = run(default, row.x())
    assert torch.equal(run(other, row.x()), expected) and far(expected, run(row.bare(), row.x()))
    default.save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / name))
    assert_same(one, two)
    loaded = PeftModel.from_pretrained(row.bare(), tmp_path / name, adapter_name="default")
    assert torch.equal(run(loaded, row.x()), expected)


@all_rows
def test_layer_shows_the_weight_that_it_runs_with_and_the_bias_of_its_base(row):
    bare, model = row.bare(), row.adapted()
    assert callable(model.save_pretrained) and callable(model.from_pretrained) and callable(model.push_to_hub)
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, CoLoRALayer):
            original = bare.get_submodule(name)
            assert torch.equal(module.base_layer.weight, original.weight)
            delta = module.get_delta_weight("default").to(original.weight.dtype)
            torch.testing.assert_close(module.weight, original.weight + delta)
            with model.disable_adapter():
                assert module.weight is module.base_layer.weight
            assert module.bias is module.base_layer.bias
            assert (module.bias is None) == (original.bias is None)


@all_rows
def test_layer_shows_its_features(row):
    for layer in tuner_layers(row.adapted()):
        base = layer.get_base_layer()
        assert layer.in_features == getattr(base, "in_features", getattr(base, "in_channels", None))
        assert layer.out_features == getattr(base, "out_features", getattr(base, "out_channels", None))


@few_rows
def test_repr_names_layer_and_adapters_in_a_few_lines(row):
    for layer in tuner_layers(row.adapted("haze", "rain")):
        text = repr(layer)
        assert text.startswith("CoLoRALayer") and repr(layer.get_base_layer()) in text
        assert "haze" in text and "rain" in text
        assert len(text.splitlines()) <= 20 and "tensor(" not in text


# --- forward and training -------------------------------------------------------------------------------------------


@all_rows
def test_new_adapter_is_the_identity(row):
    model = get_peft_model(row.bare(), row.config(init_weights=True)).eval()
    output = run(model, row.x())
    assert torch.isfinite(output).all() and torch.equal(output, run(row.bare(), row.x()))


@all_rows
def test_training_moves_every_parameter_of_the_adapter_and_no_other(row):
    model = row.adapted()
    before = weights(model)
    train(model, row.x())
    adapter = of_adapter(model, "default")
    assert trainable(model) == adapter and any(".colora_" in name for name in adapter)
    assert any(".modules_to_save." in name for name in adapter) == (row.settings == "saved")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in adapter), name
        assert (parameter.grad is None) == (name not in adapter), name
        assert torch.isfinite(parameter).all(), name


@all_rows
def test_training_and_evaluation_mode_compute_the_same(row):
    """There is nothing random in these networks, but the adapter takes other ways in the two modes."""
    model, x = row.adapted(), row.x()
    expected = run(model, x)
    assert torch.equal(run(model, x), expected)
    evaluated, trained = gradients(model, x), gradients(model.train(), x)
    assert_same(evaluated, trained, atol=1e-5)
    torch.testing.assert_close(run(model, x), expected, rtol=0, atol=1e-5)
    assert torch.equal(run(model.eval(), x), expected)


# --- merging --------------------------------------------------------------------------------------------------------


@all_rows
@pytest.mark.parametrize("safe", [False, True])
def test_merged_unmerged_and_unloaded_networks_agree(row, safe):
    bare, model, x = row.bare(), row.adapted(), row.x()
    expected, before = run(model, x), weights(model)
    assert far(expected, run(bare, x))
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(run(model, x), expected, rtol=0, atol=1e-5)
    base_weights = [layer.get_base_layer().weight for layer in tuner_layers(model)]
    originals = [bare.get_parameter(f"{name}.weight") for name in model.targeted_module_names]
    assert not any(map(torch.equal, base_weights, originals))
    model.unmerge_adapter()
    assert_same(before, model.state_dict(), atol=1e-6)
    torch.testing.assert_close(run(model, x), expected, rtol=0, atol=1e-5)

    merged = model.merge_and_unload(safe_merge=safe)
    assert type(merged) is type(bare)
    assert not any(isinstance(module, CoLoRALayer | ModulesToSaveWrapper) for module in merged.modules())
    assert merged.state_dict().keys() == bare.state_dict().keys()
    torch.testing.assert_close(run(merged, x), expected, rtol=0, atol=1e-5)


@since("0.19")
@few_rows
def test_unloaded_network_has_no_configuration_of_adapters(row):
    assert not hasattr(row.adapted().unload(), "peft_config")
    assert not hasattr(row.adapted().merge_and_unload(), "peft_config")


@all_rows
def test_merged_network_is_saved_and_pickled(row, tmp_path):
    merged = row.adapted().merge_and_unload()
    save_file(merged.state_dict(), tmp_path / "merged.safetensors")
    assert_same(merged.state_dict(), load_file(tmp_path / "merged.safetensors"))
    copied = pickle.loads(pickle.dumps(merged))
    assert torch.equal(run(copied, row.x()), run(merged, row.x()))


@all_rows
def test_merging_twice_warns_and_changes_nothing(row):
    model = row.adapted()
    model.merge_adapter()
    before = weights(model)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter()
    assert_same(before, model.state_dict())
    assert {tuple(layer.merged_adapters) for layer in tuner_layers(model)} == {("default",)}
    model.unmerge_adapter()
    torch.testing.assert_close(run(model, row.x()), run(row.adapted(), row.x()), rtol=0, atol=1e-5)


@all_rows
@pytest.mark.parametrize(("broken", "unload"), [(torch.nan, False), (torch.inf, True)], ids=["nan", "inf_unload"])
def test_safe_merge_refuses_a_broken_adapter(row, broken, unload):
    model = row.adapted()
    layers, expected = (
        tuner_layers(model),
        [layer.get_base_layer().weight.clone() for layer in tuner_layers(row.adapted())],
    )
    for layer in layers:
        for container in (layer.colora_B, layer.colora_dense):
            for parameter in container.values():
                parameter.data[0] = broken
    with pytest.raises(ValueError, match="'default'"):
        model.merge_and_unload(safe_merge=True) if unload else model.merge_adapter(safe_merge=True)
    assert not any(layer.merged for layer in layers)
    assert all(map(torch.equal, [layer.get_base_layer().weight for layer in layers], expected))


@all_rows
def test_unloading_gives_the_bare_network_back(row):
    bare, model = row.bare(), row.adapted()
    assert far(run(model, row.x()), run(bare, row.x()))
    unloaded = model.unload()
    assert type(unloaded) is type(bare) and not tuner_layers(unloaded)
    assert unloaded.state_dict().keys() == bare.state_dict().keys()
    for name, tensor in unloaded.state_dict().items():
        # What modules_to_save has trained stays, as PEFT wants it.
        trained = row.settings == "saved" and name.startswith(f"{row.last}.")
        assert torch.equal(tensor, bare.state_dict()[name]) is not trained, name


# --- disabling ------------------------------------------------------------------------------------------------------


@all_rows
@pytest.mark.parametrize("merged", [False, True])
def test_disabled_adapter_is_the_bare_network_until_enabled_again(row, merged):
    model, x, bare_output = row.adapted(), row.x(), run(row.bare(), row.x())
    expected, atol = run(model, x), 1e-5 if merged else 0
    for step in ("context", "state"):
        if merged:
            model.merge_adapter()
        if step == "context":
            with model.disable_adapter():
                torch.testing.assert_close(run(model, x), bare_output, rtol=0, atol=atol)
        else:
            model.disable_adapter_layers()
            torch.testing.assert_close(run(model, x), bare_output, rtol=0, atol=atol)
            model.enable_adapter_layers()
        assert trainable(model) == of_adapter(model, "default")
        torch.testing.assert_close(run(model, x), expected, rtol=0, atol=atol)


@since("0.19")
@few_rows
def test_leaving_the_context_restores_the_state_before_it(row):
    model, x = row.adapted(), row.x()
    outputs = {False: run(model, x), True: run(row.bare(), x)}
    for disabled in (False, True):
        if disabled:
            model.disable_adapter_layers()
        with model.disable_adapter():
            assert not trainable(model) and torch.equal(run(model, x), outputs[True])
        assert {layer.disable_adapters for layer in tuner_layers(model)} == {disabled}
        assert bool(trainable(model)) is not disabled and torch.equal(run(model, x), outputs[disabled])


@few_rows
def test_partly_disabled_network_is_reported_and_wholly_enabled_after_the_context(row):
    model = row.adapted()
    expected = run(model, row.x())
    tuner_layers(model)[0].enable_adapters(False)
    assert far(run(model, row.x()), expected) and model.get_model_status().enabled == "irregular"
    with pytest.warns(UserWarning, match="some adapter layers that are enabled"), model.disable_adapter():
        assert torch.equal(run(model, row.x()), run(row.bare(), row.x()))
    assert torch.equal(run(model, row.x()), expected)


@since("0.19")
@few_rows
@pytest.mark.filterwarnings("ignore:All adapters are already merged")
def test_status_tells_the_truth(row):
    model = row.adapted()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    for merged, disabled in product((False, True), (False, True)):
        model.merge_adapter() if merged else model.unmerge_adapter()
        model.disable_adapter_layers() if disabled else model.enable_adapter_layers()
        status, layers = model.get_model_status(), model.get_layer_status()
        tuned = [layer for layer in layers if layer.module_type == "CoLoRALayer"]
        assert len(tuned) == len(tuner_layers(model)) and len(layers) - len(tuned) == (row.settings == "saved")
        assert status.peft_types == {"default": "COLORA"} and status.adapter_model_type == "CoLoRAModel"
        assert (status.trainable_params, status.total_params) == (0 if disabled else trained, total)
        for one in (status, *tuned):
            assert one.enabled is not disabled and one.active_adapters == one.available_adapters == ["default"]
            assert one.requires_grad == {"default": not disabled} and one.devices == {"default": ["cpu"]}
        assert all(layer.merged_adapters == (["default"] if merged else []) for layer in tuned)


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_safe_merge_changes_nothing_where_one_layer_is_broken(how):
    row = Row("wide", "factors")
    model = row.adapted()
    name, last = [(n, m) for n, m in model.base_model.model.named_modules() if isinstance(m, CoLoRALayer)][-1]
    last.colora_B["default"].data[0, 0] = torch.inf
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"Layer '{name}' cannot be merged, and none was"):
        getattr(model, how)(safe_merge=True)
    assert_same(before, model.state_dict())
    assert not any(m.merged for m in model.modules() if isinstance(m, CoLoRALayer))
