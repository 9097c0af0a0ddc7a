"""Swapping adapters in place: outputs as if loaded, nothing compiled again, nothing changed by what is refused."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.tiny_networks import network

from colora_peft import CoLoRAConfig, CoLoRALayer, hotswap_adapter, prepare_model_for_compiled_hotswap

RANKS = {
    "haze": {"conv": 1, "blocks.0.conv": 1000, "gate": 2, "head": 1},
    "rain": {"conv": 2, "up": 1000, "head": 0, "blocks.0.conv": 1, "blocks.1.mix": 3},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(bare network, input, output by adapter, folder by adapter)."""
    bare, x = network()
    bare.eval()
    outputs, folders = {}, {}
    for name, ranks in RANKS.items():
        torch.manual_seed(len(folders))
        config = CoLoRAConfig(ranks=dict(ranks), colora_alpha=2.0 + len(folders), init_weights=False)
        model = get_peft_model(copy.deepcopy(bare), config).eval()
        folders[name] = tmp_path_factory.mktemp("adapters") / name
        model.save_pretrained(folders[name])
        outputs[name] = model(x).detach()
    assert not torch.allclose(outputs["haze"], outputs["rain"], atol=1e-3)
    return bare, x, outputs, folders


def loaded(files, adapter="haze", prepared=True):
    bare, _, _, folders = files
    model = PeftModel.from_pretrained(copy.deepcopy(bare), folders[adapter]).eval()
    if prepared:
        prepare_model_for_compiled_hotswap(model)
    return model


@torch.no_grad()
def test_prepared_network_computes_the_same_in_every_state(files):
    bare, x, outputs, folders = files
    model = loaded(files)
    torch.testing.assert_close(model(x), outputs["haze"], rtol=0, atol=1e-5)
    model.load_adapter(folders["rain"], "rain")
    for name in ("rain", "default", "rain"):
        model.set_adapter(name)
        torch.testing.assert_close(model(x), outputs["rain" if name == "rain" else "haze"], rtol=0, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), bare(x), rtol=0, atol=1e-6)
    model.merge_adapter()
    torch.testing.assert_close(model(x), outputs["rain"], rtol=0, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), bare(x), rtol=0, atol=1e-5)
    model.delete_adapter("rain")
    torch.testing.assert_close(model(x), outputs["haze"], rtol=0, atol=1e-5)
    model.set_adapter("default")
    torch.testing.assert_close(model.merge_and_unload()(x), outputs["haze"], rtol=0, atol=1e-5)


def test_a_prepared_network_can_still_be_trained_and_saved(files, tmp_path):
    _, x, _, _ = files
    model = loaded(files)
    assert not any("pinned" in name for name in model.state_dict())
    model.set_adapter("default")
    model.train()
    model(x).square().sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
        trained = model(x)
        torch.testing.assert_close(model.eval()(x), trained, rtol=0, atol=1e-5)
        state = {name: tensor + 0.01 for name, tensor in model.state_dict().items()}
        model.load_state_dict(state)
        after = model(x)
        assert not torch.allclose(after, trained, atol=1e-3)
        model.save_pretrained(tmp_path)
    assert copy.deepcopy(model)(x).equal(model(x))


def test_a_prepared_network_sees_what_changes_in_evaluation_mode(files):
    """Optimizer steps and writing by hand count as in any network, as long as it is not compiled."""
    _, x, _, folders = files
    model = PeftModel.from_pretrained(copy.deepcopy(files[0]), folders["haze"], is_trainable=True).eval()
    prepare_model_for_compiled_hotswap(model)
    with torch.no_grad():
        before = model(x)
    model(x).square().sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
    with torch.no_grad():
        after = model(x)
        torch.testing.assert_close(after, copy.deepcopy(model).eval()(x), rtol=0, atol=1e-6)
        assert not torch.allclose(before, after, atol=1e-5)


@torch.no_grad()
def test_swapping_in_a_compiled_network_compiles_nothing(files):
    _, x, outputs, folders = files
    torch._dynamo.reset()
    model = loaded(files)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), outputs["haze"], rtol=0, atol=1e-5)
    with torch.compiler.set_stance("fail_on_recompile"):
        for name in ("rain", "haze", "rain"):
            hotswap_adapter(compiled, folders[name])
            torch.testing.assert_close(compiled(x), outputs[name], rtol=0, atol=1e-5)
            torch.testing.assert_close(model(x), outputs[name], rtol=0, atol=1e-5)


@torch.no_grad()
def test_switching_in_a_compiled_base_network_compiles_nothing(files):
    bare, x, outputs, folders = files
    torch._dynamo.reset()
    model = loaded(files)
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend="eager")
    compiled(x)
    model.load_adapter(folders["rain"], "rain")
    with torch.compiler.set_stance("fail_on_recompile"):
        for name, expected in (("rain", outputs["rain"]), ("default", outputs["haze"])):
            model.set_adapter(name)
            torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-5)
        with model.disable_adapter():
            torch.testing.assert_close(compiled(x), bare(x), rtol=0, atol=1e-5)
        for layer in model.modules():
            if isinstance(layer, CoLoRALayer):
                layer.set_scale("default", 0.0)
        torch.testing.assert_close(compiled(x), bare(x), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.slow
def test_swapping_under_inductor(files):
    """The default backend bakes in what it takes for constant; the buffers must not be."""
    _, x, outputs, folders = files
    torch._dynamo.reset()
    compiled = torch.compile(loaded(files), fullgraph=True)
    torch.testing.assert_close(compiled(x), outputs["haze"], rtol=0, atol=1e-5)
    with torch.compiler.set_stance("fail_on_recompile"):
        hotswap_adapter(compiled, folders["rain"])
        torch.testing.assert_close(compiled(x), outputs["rain"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_swapped_model_saves_what_it_runs(files, tmp_path):
    bare, x, outputs, folders = files
    model = loaded(files)
    random_state = torch.get_rng_state()
    hotswap_adapter(model, folders["rain"])
    assert torch.equal(torch.get_rng_state(), random_state)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path).eval()
    torch.testing.assert_close(again(x), outputs["rain"], rtol=0, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@torch.no_grad()
def test_unprepared_network_takes_an_adapter_of_the_same_layers(files, tmp_path):
    bare, x, _, folders = files
    torch.manual_seed(9)
    config = CoLoRAConfig(ranks={"conv": 2, "gate": 1, "head": 1000}, init_weights=False)
    other = get_peft_model(copy.deepcopy(bare), config).eval()
    other.save_pretrained(tmp_path)
    model = loaded(files, prepared=False)
    hotswap_adapter(model, tmp_path)
    torch.testing.assert_close(model(x), other(x), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="also adapts blocks.1.mix, up.*prepare_model_for_compiled_hotswap"):
        hotswap_adapter(model, folders["rain"])


def broken(folder, target, change_config=None, change_weights=None):
    target.mkdir()
    config = json.loads((folder / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**config, **(change_config or {})}))
    weights = load_file(folder / "adapter_model.safetensors")
    (change_weights or (lambda w: None))(weights)
    save_file(weights, target / "adapter_model.safetensors")
    return target


FAULTS = {
    "missing": ({}, lambda w: w.pop("base_model.model.conv.colora_A"), "missing: conv.colora_A"),
    "unexpected": ({}, lambda w: w.update({"base_model.model.x.colora_A": torch.rand(1)}), "unexpected: x.colora_A"),
    "rank": ({"ranks": {**RANKS["rain"], "conv": 1}}, None, r"conv.colora_A \(2, 27\) instead of \(1, 27\)"),
    "layer": ({"ranks": {"tail": 1}, "target_modules": None}, None, "'tail'"),
    "whole modules": ({"modules_to_save": ["blocks"]}, None, "new adapter trains whole modules or biases"),
    "version": ({"method_version": 99}, None, "newer colora_peft"),
}


@torch.no_grad()
@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_named_and_changes_nothing(files, fault, tmp_path):
    _, x, outputs, folders = files
    change_config, change_weights, message = FAULTS[fault]
    folder = broken(folders["rain"], tmp_path / "broken", change_config, change_weights)
    model = loaded(files)
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, folder)
    torch.testing.assert_close(model(x), outputs["haze"], rtol=0, atol=1e-5)
    assert model.peft_config["default"].ranks == RANKS["haze"] | {"blocks.0.conv": 8}


def test_what_cannot_be_swapped_is_said(files, tmp_path):
    bare, _, _, folders = files
    model = loaded(files)
    with pytest.raises(ValueError, match="no adapter 'fog' to replace, only default"):
        hotswap_adapter(model, folders["rain"], "fog")
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        hotswap_adapter(model, folders["rain"])
    with pytest.raises(TypeError, match="get_peft_model"):
        prepare_model_for_compiled_hotswap(bare)
    with pytest.raises(ValueError, match="before torch.compile"):
        prepare_model_for_compiled_hotswap(torch.compile(model))
    get_peft_model(copy.deepcopy(bare), LoraConfig(target_modules=["gate"])).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="LORA"):
        hotswap_adapter(loaded(files), tmp_path)


@torch.no_grad()
def test_a_disabled_network_stays_disabled_when_prepared_and_a_second_preparation_keeps_the_buffers(files):
    bare, x, outputs, folders = files
    model = loaded(files, prepared=False)
    model.base_model.disable_adapter_layers()
    prepare_model_for_compiled_hotswap(model)
    assert {layer.disable_adapters for layer in model.modules() if isinstance(layer, CoLoRALayer)} == {True}
    buffers = [layer.pinned_weight for layer in model.modules() if isinstance(layer, CoLoRALayer)]
    prepare_model_for_compiled_hotswap(model)
    after = [layer.pinned_weight for layer in model.modules() if isinstance(layer, CoLoRALayer)]
    assert all(one is other for one, other in zip(buffers, after, strict=True))
    torch.testing.assert_close(model(x), bare(x), rtol=0, atol=1e-6)
    hotswap_adapter(model, folders["rain"])
    model.base_model.enable_adapter_layers()
    torch.testing.assert_close(model(x), outputs["rain"], rtol=0, atol=1e-5)


def test_gradients_flow_in_evaluation_mode_as_before(files):
    bare, x, _, folders = files
    model = PeftModel.from_pretrained(copy.deepcopy(bare), folders["haze"], is_trainable=True).eval()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def gradients():
        wanted = dict(model.named_parameters())
        return torch.autograd.grad(model(x).square().sum(), [wanted[name] for name in names])

    expected = gradients()
    prepare_model_for_compiled_hotswap(model)
    torch.testing.assert_close(gradients(), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_adapter_of_16_bits_is_swapped_in_as_it_would_be_loaded(files, tmp_path):
    bare, _, _, folders = files
    folder = broken(folders["rain"], tmp_path / "half", None, lambda w: w.update({k: v.half() for k, v in w.items()}))
    model = loaded(files)
    hotswap_adapter(model, folder)
    expected = PeftModel.from_pretrained(copy.deepcopy(bare), folder).state_dict()
    own = {name: weight for name, weight in model.state_dict().items() if "colora_" in name}
    assert own and {weight.dtype for weight in own.values()} == {torch.float32}
    assert all(torch.equal(weight, expected[name]) for name, weight in own.items())


def test_adapters_with_biases_and_a_compiled_base_network_are_refused(files):
    model = loaded(files, prepared=False)
    model.peft_config["default"].bias = "all"
    with pytest.raises(ValueError, match="default trains biases"):
        prepare_model_for_compiled_hotswap(model)
    model = loaded(files, prepared=False)
    model.base_model.model = torch.compile(model.base_model.model)
    with pytest.raises(ValueError, match="before torch.compile"):
        prepare_model_for_compiled_hotswap(model)
