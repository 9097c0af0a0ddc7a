"""Adapters that do not fit the network: every fault is named, and the network stays as it was."""

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file, save_file
from support.tiny_networks import Sequence, network
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from colora_peft import CoLoRAConfig, CoLoRALayer, hotswap_adapter
from colora_peft.tuner.load_checks import check_adapter_weights, weights_by_adapter

RANKS = {"conv": 2, "up": 1000, "head": 1, "gate": 0}


def saved(tmp_path, change_config=None, change_weights=None):
    """(bare network, input, expected output, folder of an adapter in which something was changed)."""
    bare, x = network()
    bare.eval()
    model = get_peft_model(copy.deepcopy(bare), CoLoRAConfig(ranks=dict(RANKS), init_weights=False)).eval()
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **(change_config or {})}))
    weights = load_file(folder / "adapter_model.safetensors")
    (change_weights or (lambda w: None))(weights)
    save_file(weights, folder / "adapter_model.safetensors")
    return bare, x, model(x).detach(), folder


PREFIX = "base_model.model."
FAULTS = {
    "missing": ({}, lambda w: w.pop(f"{PREFIX}conv.colora_A"), "'NAME'.*missing: conv.colora_A"),
    "several": ({}, lambda w: [w.pop(k) for k in list(w) if "head" in k], "missing: head.colora_A, head.colora_B"),
    "unexpected": ({}, lambda w: w.update({f"{PREFIX}gate.colora_A": torch.rand(1, 8)}), "unexpected: gate.colora_A"),
    "rank": ({"ranks": RANKS | {"conv": 1}}, None, r"another shape: conv.colora_A \(2, 27\) instead of \(1, 27\)"),
    "dense": ({"ranks": RANKS | {"up": 1}}, None, "missing: up.colora_A, up.colora_B; unexpected: up.colora_dense"),
}  # fmt: skip


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_do_not_fit_leave_the_bare_network(fault, low_cpu_mem_usage, tmp_path):
    change_config, change_weights, message = FAULTS[fault]
    bare, x, _, folder = saved(tmp_path, change_config, change_weights)
    base = copy.deepcopy(bare)
    with pytest.raises(ValueError, match=message.replace("NAME", "default")):
        PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(base(x), bare(x))
    assert not any(isinstance(module, CoLoRALayer) for module in base.modules())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_do_not_fit_leave_the_other_adapters(fault, low_cpu_mem_usage, tmp_path):
    change_config, change_weights, message = FAULTS[fault]
    bare, x, _, folder = saved(tmp_path, change_config, change_weights)
    model = get_peft_model(copy.deepcopy(bare), CoLoRAConfig(ranks=1, init_weights=False), "haze").eval()
    before, names = model(x), set(model.state_dict())
    with pytest.raises(ValueError, match=message.replace("NAME", "rain")):
        model.load_adapter(folder, "rain", low_cpu_mem_usage=low_cpu_mem_usage)
    assert list(model.peft_config) == ["haze"] and set(model.state_dict()) == names
    assert torch.equal(model(x), before)
    # and the name is free for the right file
    *_, expected, good = saved(tmp_path / "good")
    model.load_adapter(good, "rain")
    model.set_adapter("rain")
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)


def test_a_trained_adapter_outlives_a_file_that_does_not_fit_it(tmp_path):
    bare, x, _, folder = saved(tmp_path)
    model = get_peft_model(copy.deepcopy(bare), CoLoRAConfig(ranks=1, init_weights=False)).eval()
    before = model(x)
    with pytest.raises(ValueError, match="do not fit"):
        model.load_adapter(folder, "default")
    assert torch.equal(model(x), before)


def test_an_adapter_of_another_network_is_refused(tmp_path):
    *_, folder = saved(tmp_path)
    base = Sequence()
    with pytest.raises(ValueError, match="'conv' in `ranks` is not that of a layer"):
        PeftModel.from_pretrained(base, folder)
    assert not any(isinstance(module, CoLoRALayer) for module in base.modules())


def test_an_adapter_of_a_newer_method_is_refused(tmp_path):
    bare, _, _, folder = saved(tmp_path, {"method_version": 3})
    with pytest.raises(
        ValueError, match="newer colora_peft .method_version 3.*update colora_peft, in a clone with `git pull`"
    ):
        PeftModel.from_pretrained(bare, folder)


def test_fields_of_a_newer_peft_are_ignored_with_a_warning(tmp_path):
    bare, x, expected, folder = saved(tmp_path, {"field_of_tomorrow": 3})
    with pytest.warns(UserWarning, match="field_of_tomorrow"):
        model = PeftModel.from_pretrained(bare, folder).eval()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)


OLD_FACTORS = {
    1: lambda alpha, rank, k, dense: alpha / (k if dense else rank) ** 0.5,
    2: lambda alpha, rank, k, dense: alpha / (k if dense else rank * k**0.5),
}


@torch.no_grad()
@pytest.mark.parametrize("written", [{"method_version": 1}, {"method_version": None}, {}, {"method_version": 2}])
def test_an_adapter_of_an_older_version_computes_as_it_did(tmp_path, written):
    """Loaded, saved and loaded again, swapped in, or blended with one of today: its delta is that of its version."""
    bare, x, _, folder = saved(tmp_path, {"colora_alpha": 3.0})
    file, version = folder / "adapter_config.json", written.get("method_version") or 1
    config = {name: value for name, value in json.loads(file.read_text()).items() if name != "method_version"}
    file.write_text(json.dumps(config | written))
    expected, stored = copy.deepcopy(bare), load_file(folder / "adapter_model.safetensors")
    for name, rank in RANKS.items():
        if rank:
            own = {kind: stored.get(f"{PREFIX}{name}.colora_{kind}") for kind in ("A", "B", "dense")}
            dense = own["dense"] is not None
            weight = expected.get_submodule(name).weight
            factor = OLD_FACTORS[version](3.0, rank, weight[0].numel(), dense)
            weight += factor * (own["dense"] if dense else own["B"] @ own["A"]).view_as(weight)
    model = PeftModel.from_pretrained(copy.deepcopy(bare), folder).eval()
    assert model.peft_config["default"].method_version == version
    torch.testing.assert_close(model(x), expected(x), rtol=0, atol=1e-6)

    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["method_version"] == version
    again = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path / "again").eval()
    assert torch.equal(again(x), model(x))

    today = get_peft_model(copy.deepcopy(bare), CoLoRAConfig(ranks=dict(RANKS), init_weights=False)).eval()
    today.load_adapter(folder, "old")
    today.add_weighted_adapter(["default", "old"], [0.0, 1.0], "blend")
    today.add_weighted_adapter(["old", "default"], [1.0, 0.0], "tuned", "svd")
    for name in ("old", "blend", "tuned"):
        today.set_adapter(name)
        torch.testing.assert_close(today(x), expected(x), rtol=0, atol=1e-5)
    hotswap_adapter(today, folder, "default")
    today.set_adapter("default")
    torch.testing.assert_close(today(x), expected(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("version", ["two", 0, 2.5])
def test_a_version_that_is_no_number_is_named(tmp_path, version):
    bare, _, _, folder = saved(tmp_path, {"method_version": version})
    with pytest.raises(ValueError, match=f"method_version is {version!r}, not a whole number"):
        PeftModel.from_pretrained(bare, folder)


@pytest.mark.parametrize("name", ["train", "half", "keys"])
def test_names_that_pytorch_needs_itself_are_refused_before_anything_is_changed(name):
    bare, x = network()
    bare.eval()
    with pytest.raises(ValueError, match=f"'{name}' is that of an attribute"):
        get_peft_model(bare, CoLoRAConfig(), adapter_name=name)
    assert not any(isinstance(module, CoLoRALayer) for module in bare.modules())


def test_weights_are_sorted_by_adapter():
    tensor = torch.rand(2)
    state = {
        "m.a.colora_A.one": tensor,
        "m.a.b.colora_dense.two": tensor,
        "m.a.colora_B.colora_B": tensor,
        "m.b.colora_A": tensor,
        "m.a.weight": tensor,
        "a.colora_A.one": tensor,
    }
    found = weights_by_adapter(state, "m.", "colora_")
    assert {adapter: list(names) for adapter, names in found.items()} == {
        "one": ["a.colora_A"],
        "two": ["a.b.colora_dense"],
        "colora_B": ["a.colora_B"],
        None: ["b.colora_A"],
    }
    check_adapter_weights(found["one"], found["one"], "one")


since_021 = pytest.mark.skipif(
    not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"), reason="older PEFT does not say what it loads"
)


@since_021
@pytest.mark.parametrize("foreign", [False, True])
def test_a_file_without_weights_of_the_adapter_is_refused(foreign, tmp_path):
    def strip(weights):
        weights.clear()
        if foreign:
            weights["base_model.model.conv.lora_A.weight"] = torch.rand(2, 27)

    bare, x, _, folder = saved(tmp_path, None, strip)
    base = copy.deepcopy(bare)
    with pytest.raises(ValueError, match="missing: conv.colora_A"):
        PeftModel.from_pretrained(base, folder)
    assert torch.equal(base(x), bare(x))


@since_021
def test_only_the_loading_of_adapters_is_strict(tmp_path):
    bare, x, _, folder = saved(tmp_path)
    model = get_peft_model(copy.deepcopy(bare), CoLoRAConfig(ranks=dict(RANKS)))
    part = {f"{PREFIX}conv.colora_B.default": torch.ones(8, 2)}
    assert model.load_state_dict(part, strict=False).missing_keys
    assert model.base_model.model.conv.colora_B["default"].eq(1).all()
    part |= {f"{PREFIX}conv.colora_B.default": torch.zeros(8, 2), f"{PREFIX}head.colora_A.default": torch.ones(7, 27)}
    with pytest.raises(ValueError, match="of another shape: head.colora_A"):
        model.load_state_dict(part, strict=False)
    assert model.base_model.model.conv.colora_B["default"].eq(1).all()
    weights = load_file(folder / "adapter_model.safetensors")
    weights[f"{PREFIX}conv.colora_A"] = torch.rand(7, 27)
    with pytest.warns(UserWarning, match="conv.colora_A"):
        set_peft_model_state_dict(model, weights, ignore_mismatched_sizes=True)
    assert model.base_model.model.head.colora_A["default"].equal(weights[f"{PREFIX}head.colora_A"])


@since_021
@pytest.mark.parametrize("name", ["colora_rain", "colora_A"])
def test_adapters_called_like_parameters_load(name, tmp_path):
    bare, x, expected, folder = saved(tmp_path)
    model = PeftModel.from_pretrained(copy.deepcopy(bare), folder, adapter_name=name)
    assert torch.equal(model.eval()(x), expected)
    hotswap_adapter(model, folder, name)
    assert torch.equal(model(x), expected)


@since_021
def test_weights_of_a_merged_adapter_cannot_be_replaced(tmp_path):
    bare, x, expected, folder = saved(tmp_path)
    model = PeftModel.from_pretrained(copy.deepcopy(bare), folder).eval()
    model.merge_adapter()
    with pytest.raises(ValueError, match="'default' is merged: call unmerge_adapter"):
        model.load_adapter(folder, "default")
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), bare(x))


@since_021
def test_a_network_that_fsdp_has_sharded_is_loaded_without_our_check(tmp_path):
    """Its parameters have other names and shapes than those of the file."""
    _, _, _, folder = saved(tmp_path)
    bare, _ = network()
    model = get_peft_model(bare, CoLoRAConfig(ranks=dict(RANKS)))
    sharded = torch.nn.Module()
    sharded._fsdp_wrapped_module = model.base_model.model.conv
    model.base_model.model.conv = sharded
    weights = load_file(folder / "adapter_model.safetensors")
    set_peft_model_state_dict(model, weights)
    assert torch.equal(model.base_model.model.head.colora_B["default"], weights[f"{PREFIX}head.colora_B"])


@since_021
def test_blocks_wrapped_for_checkpointing_are_loaded_and_checked(tmp_path):
    bare, x, expected, folder = saved(tmp_path)
    model = get_peft_model(copy.deepcopy(bare), CoLoRAConfig(ranks=dict(RANKS)))
    network_ = model.base_model.model
    network_.conv = checkpoint_wrapper(network_.conv)
    weights = load_file(folder / "adapter_model.safetensors")
    set_peft_model_state_dict(model, weights)
    torch.testing.assert_close(model.eval()(x), expected, rtol=0, atol=1e-6)
    del weights[f"{PREFIX}conv.colora_A"]
    with pytest.raises(ValueError, match="missing: conv.colora_A"):
        set_peft_model_state_dict(model, weights)
