"""PEFT's own test matrix, several adapters: which are active, merged, trainable, and how one is deleted."""

import warnings

import pytest
import torch
from peft import get_peft_model
from support.contract_networks import (
    Row,
    all_rows,
    assert_same,
    far,
    few_rows,
    of_adapter,
    plain_rows,
    plain_with_deltas,
    run,
    since,
    trainable,
    tuner_layers,
    weights,
)

from colora_peft import adaptable_layers
from colora_peft.tuner.peft_internals import SAVES_BIASES

# --- which adapters are active --------------------------------------------------------------------------------------


@plain_rows
def test_active_adapters_are_one_or_several(row):
    model = row.adapted("haze", "rain", "blur")
    assert model.active_adapters == ["haze"] and model.active_adapter == "haze"
    for names in (["rain"], ["haze", "rain"], ["blur", "haze"], ["haze"]):
        model.set_adapter(names[0]) if len(names) == 1 else model.base_model.set_adapter(names)
        assert model.active_adapters == names
        assert {tuple(layer.active_adapters) for layer in tuner_layers(model)} == {tuple(names)}
        assert trainable(model) == set().union(*(of_adapter(model, name) for name in names))
        expected = run(plain_with_deltas(row, model, *names), row.x())
        torch.testing.assert_close(run(model, row.x()), expected, rtol=0, atol=1e-5)


@since("0.21")
@few_rows
def test_second_adapter_of_a_known_name_is_refused_and_changes_nothing(row):
    model = row.adapted("haze", "rain")
    config, before = model.peft_config["haze"], weights(model)
    with pytest.raises(ValueError, match="haze.*already exists"):
        model.add_adapter("haze", row.config(ranks=2))
    assert model.peft_config["haze"] is config
    assert_same(before, model.state_dict())


def two_halves(row):
    """A network with `haze` on its first two thirds and `rain` on its last two; and the names of their layers."""
    names = list(adaptable_layers(row.bare()))
    third = len(names) // 3
    layers = {"haze": names[: 2 * third], "rain": names[third:]}
    rank = row.config().ranks
    torch.manual_seed(2)
    model = get_peft_model(row.bare(), row.config(ranks=dict.fromkeys(layers["haze"], rank)), "haze")
    model.add_adapter("rain", row.config(ranks=dict.fromkeys(layers["rain"], rank)))
    return model.eval(), layers


@plain_rows
def test_adapters_of_different_layers_work_alone_and_together(row):
    model, layers = two_halves(row)
    network, x = model.get_base_model(), row.x()
    for active in (["haze"], ["rain"], ["haze", "rain"], ["rain", "haze"]):
        model.base_model.set_adapter(active)
        expected = run(plain_with_deltas(row, model, *active), x)
        torch.testing.assert_close(run(model, x), expected, rtol=0, atol=1e-5)
        model.merge_adapter()
        for name in {*layers["haze"], *layers["rain"]}:
            here = [adapter for adapter in active if name in layers[adapter]]
            assert network.get_submodule(name).merged_adapters == here
        torch.testing.assert_close(run(model, x), expected, rtol=0, atol=1e-5)
        model.unmerge_adapter()
        for adapter in ("haze", "rain"):
            parameters = of_adapter(model, adapter)
            assert all(any(f".{name}." in parameter for name in layers[adapter]) for parameter in parameters)
            assert (parameters <= trainable(model)) == (adapter in active)


# --- merging --------------------------------------------------------------------------------------------------------


@plain_rows
@pytest.mark.parametrize("how", ["active", "by_name", "one_by_one"])
def test_adapters_merge_together_or_one_after_the_other(row, how):
    model, x = row.adapted("haze", "rain"), row.x()
    haze, before = run(model, x), weights(model)
    both = run(plain_with_deltas(row, model, "haze", "rain"), x)
    assert far(haze, both)
    if how == "active":
        model.base_model.set_adapter(["haze", "rain"])
        model.merge_adapter()
    elif how == "by_name":
        model.merge_adapter(["haze", "rain"], safe_merge=True)
    else:
        model.merge_adapter(["haze"])
        with pytest.warns(UserWarning, match="You are now additionally merging rain"):
            model.merge_adapter(["rain"])
    torch.testing.assert_close(run(model, x), both, rtol=0, atol=1e-5)
    assert {tuple(layer.merged_adapters) for layer in tuner_layers(model)} == {("haze", "rain")}
    model.unmerge_adapter()
    assert not any(layer.merged for layer in tuner_layers(model))
    assert_same(before, model.state_dict(), atol=1e-6)
    if how != "active":
        torch.testing.assert_close(run(model, x), haze, rtol=0, atol=1e-5)


@plain_rows
@pytest.mark.parametrize("names", [["haze"], ["rain"], ["rain", "haze"]], ids="+".join)
def test_adapters_named_at_unloading_are_the_ones_that_are_merged(row, names):
    model = row.adapted("haze", "rain")
    expected = plain_with_deltas(row, model, *names)
    merged = model.merge_and_unload(adapter_names=names)
    assert_same(expected.state_dict(), merged.state_dict(), atol=1e-6)


@plain_rows
def test_choosing_an_adapter_unmerges_the_other(row):
    model = row.adapted("haze", "rain")
    before = weights(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("rain")
    assert_same(before, model.state_dict(), atol=1e-6)
    expected = run(plain_with_deltas(row, model, "rain"), row.x())
    torch.testing.assert_close(run(model, row.x()), expected, rtol=0, atol=1e-5)


# --- modules_to_save ------------------------------------------------------------------------------------------------


@since("0.19")
@pytest.mark.parametrize("kind", ["linear", "transposed", "nafnet"])
@pytest.mark.parametrize("saving_comes_first", [True, False])
def test_adapter_with_modules_to_save_and_one_without_switch(kind, saving_comes_first):
    saving, plain = Row(kind, "saved"), Row(kind, "factors")
    rows = {"haze": saving, "rain": plain} if saving_comes_first else {"rain": plain, "haze": saving}
    names = [name for name in adaptable_layers(plain.bare()) if name != plain.last]
    model = None
    for name, row in rows.items():
        config = row.config(ranks=dict.fromkeys(names, 1))
        model = get_peft_model(row.bare(), config, name) if model is None else model.add_adapter(name, config) or model
    wrapper, x = model.get_base_model().get_submodule(plain.last), plain.x()
    assert list(wrapper.modules_to_save) == ["haze"]  # no needless copy
    wrapper.modules_to_save["haze"].weight.data.add_(0.1)
    for name in ("rain", "haze", "rain"):
        model.set_adapter(name)
        expected = plain_with_deltas(plain, model, name)
        expected.get_submodule(plain.last).weight.data.add_(0.1 if name == "haze" else 0)
        torch.testing.assert_close(run(model.eval(), x), run(expected, x), rtol=0, atol=1e-5)
        assert wrapper.active_adapters == (["haze"] if name == "haze" else [])
        assert trainable(model) == of_adapter(model, name)


@pytest.mark.parametrize(
    ("one", "other", "works"),
    [(["last"], ["last"], False), (["last", "middle"], ["middle"], False), (["last"], ["middle"], True)],
)
def test_adapters_that_save_the_same_module_cannot_be_active_together(one, other, works):
    row = Row("conv2d", "factors")
    model = get_peft_model(row.bare(), row.config(ranks={"first": 1}, modules_to_save=one), "haze")
    model.add_adapter("rain", row.config(ranks={"first": 1}, modules_to_save=other))
    if not works:
        with pytest.raises(ValueError, match="Only one adapter can be set at a time for ModulesToSaveWrapper"):
            model.base_model.set_adapter(["haze", "rain"])
        return
    model.base_model.set_adapter(["haze", "rain"])
    assert trainable(model) == of_adapter(model, "haze") | of_adapter(model, "rain")
    expected = run(plain_with_deltas(row, model, "haze", "rain"), row.x())
    torch.testing.assert_close(run(model.eval(), row.x()), expected, rtol=0, atol=1e-5)


# --- deleting -------------------------------------------------------------------------------------------------------


@all_rows
def test_deleting_the_active_adapter_activates_the_next(row):
    model, x = row.adapted("haze", "rain", "blur"), row.x()
    model.set_adapter("rain")
    rain = run(model, x)
    model.set_adapter("haze")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the new active adapter
        model.delete_adapter("haze")
        assert model.active_adapters == ["blur"] and trainable(model) == of_adapter(model, "blur")
        model.set_adapter("rain")
        model.delete_adapter("blur")
        assert model.active_adapters == ["rain"] and list(model.peft_config) == ["rain"]
        assert torch.equal(run(model, x), rain)
        model.delete_adapter("rain")
    assert model.active_adapters == [] and not model.peft_config and not trainable(model)
    assert torch.equal(run(model.base_model, x), run(row.bare(), x))


def mentions(model, adapter):
    """Names of all attributes of all modules that hold something for `adapter`."""
    found = set()
    for module in model.modules():
        for name, value in [*vars(module).items(), *module._modules.items()]:
            if hasattr(value, "keys") and adapter in list(value.keys()):
                found.add(name)
            elif isinstance(value, list | set) and adapter in value:
                found.add(name)
    return found


@few_rows
@pytest.mark.parametrize("active", [True, False])
def test_deleted_adapter_leaves_nothing_behind(row, active):
    model = row.adapted("haze", "rain")
    model.set_adapter("rain" if active else "haze")
    containers = {"dense": {"colora_dense"}}.get(row.settings, {"colora_A", "colora_B"})
    assert mentions(model, "rain") >= {"rank", "scaling", "peft_config"} | containers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the new active adapter
        model.delete_adapter("rain")
    assert mentions(model, "rain") == set()
    assert model.active_adapters == ["haze"] and torch.equal(
        run(model, row.x()), run(row.adapted("haze", "rain"), row.x())
    )


@since("0.21")
@few_rows
def test_merged_adapter_cannot_be_deleted(row):
    model = row.adapted("haze", "rain")
    model.set_adapter("rain")
    expected = run(model, row.x())
    model.merge_adapter()
    before = weights(model)
    with pytest.raises(ValueError, match="'rain'.*while they are merged"):
        model.delete_adapter("rain")
    assert list(model.peft_config) == ["haze", "rain"]
    assert_same(before, model.state_dict())
    model.delete_adapter("haze")
    assert {tuple(layer.merged_adapters) for layer in tuner_layers(model)} == {("rain",)}
    model.unmerge_adapter()
    torch.testing.assert_close(run(model, row.x()), expected, rtol=0, atol=1e-5)
    model.delete_adapter("rain")
    assert not model.peft_config


@few_rows
def test_unknown_adapter_cannot_be_chosen_or_deleted(row):
    model = row.adapted("haze")
    for refused in (model.delete_adapter, model.set_adapter):
        with pytest.raises(ValueError, match="rain (does not exist|not found)"):
            refused("rain")


# --- what is trained ------------------------------------------------------------------------------------------------


@since("0.19")
@few_rows
def test_gradients_are_asked_for_adapter_by_adapter(row):
    model = row.adapted("haze", "rain")
    haze, rain = of_adapter(model, "haze"), of_adapter(model, "rain")
    assert haze and rain and trainable(model) == haze
    model.set_requires_grad("rain")
    assert trainable(model) == haze | rain
    model.set_requires_grad(["haze", "rain"], requires_grad=False)
    assert not trainable(model)
    for name, expected in (("haze", haze), ("rain", rain)):
        model.set_adapter(name, inference_mode=False)
        assert trainable(model) == expected
        model.set_adapter(name, inference_mode=True)
        assert not trainable(model) and model.active_adapters == [name]


@few_rows
def test_status_of_two_adapters(row):
    model = row.adapted("haze", "rain")
    model.set_adapter("rain")
    status = model.get_model_status()
    assert status.available_adapters == ["haze", "rain"] and status.active_adapters == ["rain"]
    assert status.requires_grad == {"haze": False, "rain": True} and status.merged_adapters == []
    assert status.devices == {"haze": ["cpu"], "rain": ["cpu"]}
    tuner_layers(model)[0].merge()
    assert model.get_model_status().merged_adapters == "irregular"
    tuner_layers(model)[0].unmerge()
    tuner_layers(model)[0].set_adapter("haze")
    assert model.get_model_status().active_adapters == model.get_model_status().requires_grad["rain"] == "irregular"


BIASES = [("all", "all"), ("all", "colora_only"), ("colora_only", "none"), ("none", "all")]


@pytest.mark.skipif(not SAVES_BIASES, reason="this PEFT does not save biases")
@pytest.mark.parametrize(("one", "other"), BIASES)
def test_only_one_adapter_may_train_biases(one, other):
    row = Row("conv2d", "factors")
    model = get_peft_model(row.bare(), row.config(bias=one), "haze")
    before, allowed = weights(model), "none" in (one, other)
    if one != "none":
        with pytest.warns(UserWarning, match="disabling adapter layers with bias"), model.disable_adapter():
            pass
    if allowed:
        model.add_adapter("rain", row.config(bias=other))
        assert list(model.peft_config) == ["haze", "rain"]
    else:
        with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
            model.add_adapter("rain", row.config(bias=other))
        assert list(model.peft_config) == list(model.base_model.peft_config) == ["haze"]
        assert_same(before, model.state_dict())
