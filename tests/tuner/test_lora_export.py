"""A CoLoRA adapter exported to stock LoRA gives the same network in plain PEFT."""

import copy
import re
import subprocess
import sys
from collections import OrderedDict

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from support.tiny_networks import Restorer, network, tiny_nafnet
from torch import nn
from transformers.integrations.peft import MIN_PEFT_VERSION

import colora_peft.tuner.lora_export as lora_export
from colora_peft import CoLoRAConfig
from colora_peft.tuner.lora_export import lora_obstacle, save_as_lora
from colora_peft.tuner.peft_internals import SAVES_BIASES

needs_biases = pytest.mark.skipif(not SAVES_BIASES, reason="this PEFT does not save trained biases")
WEIGHTS = "adapter_model.safetensors"


MIXED = {"conv": 2, "blocks.0.conv": 0, "blocks.0.mix": 1, "blocks.1.conv": 1000, "blocks.1.mix": 1, "line": 3}
MIXED |= {"blocks_1_conv": 0, "down": 2, "volume": 1000, "mlp.conv": 4, "mlp.xconv": 1000}
SETTINGS = {"factors": {"ranks": 1}, "dense": {"ranks": 1000}, "mixed": {"ranks": MIXED}}
SETTINGS["budget"] = {"ranks": None, "parameter_budget": 0.4}


def plain():
    """Every kind of layer that LoRA can express, with names that match each other's, and an input."""
    torch.manual_seed(0)
    part = OrderedDict(conv=nn.Conv2d(4, 4, 3, padding=1), act=nn.Tanh(), mix=nn.Conv2d(4, 4, 1))
    layers = OrderedDict(
        conv=nn.Conv2d(3, 4, 5, padding="same"),
        blocks=nn.Sequential(nn.Sequential(part), nn.Sequential(copy.deepcopy(part))),
        blocks_1_conv=nn.Conv2d(4, 4, 1, bias=False),
        norm=nn.GroupNorm(2, 4),
        down=nn.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 0)),
        depth=nn.Unflatten(1, (1, 6)),
        volume=nn.Conv3d(1, 2, 3, stride=(2, 1, 1), padding=1),
        flat=nn.Sequential(nn.Flatten(1, 2), nn.Flatten(2)),
        line=nn.Conv1d(6, 6, 3, padding="valid"),
        mlp=nn.Sequential(OrderedDict(conv=nn.Linear(18, 7), act=nn.Tanh(), xconv=nn.Linear(7, 5))),
    )
    return nn.Sequential(layers).eval(), torch.rand(2, 3, 9, 8)


def adapted(bare, name="default", **settings):
    """The network with an adapter that is not the identity."""
    config = CoLoRAConfig(init_weights=False, **{"ranks": 2, **settings})
    return get_peft_model(copy.deepcopy(bare), config, name).eval()


def trained_whole(model):
    """The model with other biases and modules_to_save, as after training; they start as the base's."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 50)
    return model


def loaded(bare, path, **settings):
    """The network with the exported adapter, which must be stock LoRA."""
    model = PeftModel.from_pretrained(copy.deepcopy(bare), path, **settings).eval()
    assert type(model.peft_config["default"]) is LoraConfig
    return model


def restorer_of(folder):
    base = Restorer().eval()
    base.load_state_dict(load_file(folder / "model.safetensors"))
    return base


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def close(output, expected, atol=1e-5):
    torch.testing.assert_close(output, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("settings", SETTINGS)
def test_plain_peft_gives_the_same_output_merged_or_not(settings, tmp_path):
    bare, x = plain()
    model = adapted(bare, **SETTINGS[settings])
    expected = model(x)
    assert not torch.allclose(expected, bare(x), atol=1e-2)
    returned = save_as_lora(tmp_path, model)
    assert files(tmp_path) == ["adapter_config.json", WEIGHTS]
    assert PeftConfig.from_pretrained(tmp_path).to_dict() == returned.to_dict() and returned.inference_mode
    close(loaded(bare, tmp_path, low_cpu_mem_usage=True)(x), expected)
    lora = loaded(bare, tmp_path)
    close(lora(x), expected)
    assert not any(parameter.requires_grad for parameter in lora.parameters())
    with lora.disable_adapter():
        assert torch.equal(lora(x), bare(x))
    merged, reference = lora.merge_and_unload(), model.merge_and_unload().state_dict()
    close(merged(x), expected)
    for name, tensor in merged.state_dict().items():
        close(tensor, reference[name], atol=1e-6)


def test_each_layer_gets_its_own_rank_and_layers_without_an_adapter_get_none(tmp_path):
    bare = plain()[0].bfloat16()
    model = get_peft_model(copy.deepcopy(bare), CoLoRAConfig(ranks=MIXED), autocast_adapter_dtype=False)
    config = save_as_lora(tmp_path, model)
    layers = {n: m for n, m in loaded(bare, tmp_path).get_base_model().named_modules() if isinstance(m, LoraLayer)}
    dense = {"blocks.1.conv": 4, "volume": 2, "mlp.xconv": 5}
    expected = {name: dense.get(name, rank) for name, rank in MIXED.items() if rank > 0}
    assert {name: layer.r["default"] for name, layer in layers.items()} == expected
    assert {layer.scaling["default"] for layer in layers.values()} == {1.0}
    assert len(config.rank_pattern) == 4  # one expression for each rank but the default: see _lora_config
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {torch.float32}


def test_a_fresh_process_loads_it_without_this_package(tmp_path):
    torch.manual_seed(0)
    bare, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))), torch.rand(1, 3, 6, 6)
    model = adapted(bare, ranks={"0": 2, "1.0": 1000})
    save_as_lora(tmp_path, model)
    save_file({"x": x, "y": model(x).detach()}, tmp_path / "expected.safetensors")
    program = f"""
import sys
sys.modules["colora_peft"] = None  # from here on importing it is an error
import torch
from peft import PeftModel
from safetensors.torch import load_file
torch.manual_seed(0)
nn, expected = torch.nn, load_file({str(tmp_path / "expected.safetensors")!r})
bare = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)))
model = PeftModel.from_pretrained(bare, {str(tmp_path)!r})
assert torch.allclose(model(expected["x"]), expected["y"], rtol=0, atol=1e-5)
assert [name for name in sys.modules if name.startswith("colora_peft")] == ["colora_peft"]
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Square(nn.Conv2d):
    def __init__(self, channels, *_, **__):
        super().__init__(channels, channels, 3, padding=1)


# Reason, or None for what only looks like an obstacle; all take (2, 4, 8, 8).
OBSTACLES = {
    "grouped": (lambda: nn.Conv2d(4, 4, 3, groups=2), "it has 2 groups"),
    "dilated": (lambda: nn.Conv2d(4, 4, (1, 3), dilation=2), r"dilation \(2, 2\)"),
    "reflect": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "pads by 'reflect'"),
    "circular_same": (lambda: nn.Conv2d(4, 4, 3, padding="same", padding_mode="circular"), "pads by 'circular'"),
    "transposed": (lambda: nn.ConvTranspose2d(4, 3, 2, stride=2), "it is a ConvTranspose2d"),
    "doubled": (lambda: Doubled(8, 6), "class Doubled has its own `forward`"),
    "square": (lambda: Square(4), "class Square has its own `__init__`"),
    "unpadded_reflect": (lambda: nn.Conv2d(4, 5, 3, padding_mode="reflect"), None),
    "pointwise_dilated": (lambda: nn.Conv2d(4, 5, 1, dilation=3, padding=1), None),
    "subclass": (lambda: type("Named", (nn.Linear,), {})(8, 6), None),
    "flat_3d": (lambda: nn.Sequential(nn.Unflatten(1, (4, 1)), nn.Conv3d(4, 5, (1, 3, 3), padding=1)), None),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_an_obstacle_is_where_stock_lora_differs_and_nowhere_else(name, tmp_path, monkeypatch):
    make, reason = OBSTACLES[name]
    torch.manual_seed(0)
    bare, x = nn.Sequential(make()), torch.rand(2, 4, 8, 8)
    model = adapted(bare)
    found = lora_obstacle(bare[0][1] if name == "flat_3d" else bare[0])
    assert found is None if reason is None else re.search(reason, found)
    monkeypatch.setattr(lora_export, "lora_obstacle", lambda layer: None)
    try:
        save_as_lora(tmp_path, model)
        same = torch.allclose(loaded(bare, tmp_path)(x), model(x), rtol=0, atol=1e-5)
    except (RuntimeError, TypeError, ValueError):
        same = False
    assert same == (reason is None)


OBSTRUCTED = {"conv": "reflect", "blocks.0.conv": "8 groups", "blocks.1.conv": "8 groups", "head": "dilation"}
OBSTRUCTED["up"] = "ConvTranspose2d"


def test_all_unsupported_layers_are_listed_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="cannot express 5 of the 9 layers.*merged_base") as error:
        save_as_lora(tmp_path / "lora", adapted(Restorer()))
    for name, reason in OBSTRUCTED.items():
        assert re.search(f"'{name}': [^;]*{reason}", str(error.value)), name
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("ranks", [1, 1000], ids=["factors", "dense"])
def test_merged_base_of_a_plain_network(ranks, tmp_path):
    bare, x = network()
    model = adapted(bare, ranks=ranks)
    before, facts = copy.deepcopy(model.state_dict()), [(p.data_ptr(), p.requires_grad) for p in model.parameters()]
    config = save_as_lora(tmp_path / "lora", model, merged_base=tmp_path / "base")
    assert config.base_model_name_or_path == str(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    changed = {name for name, tensor in bare.state_dict().items() if not torch.equal(tensor, weights[name])}
    assert changed == {f"{name}.weight" for name in OBSTRUCTED}
    lora = loaded(restorer_of(tmp_path / "base"), tmp_path / "lora")
    close(lora(x), model(x))
    close(lora.merge_and_unload()(x), model(x))
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert facts == [(p.data_ptr(), p.requires_grad) for p in model.parameters()] and not model.training
    assert all(p.data_ptr() in dict(facts) for p in lora_export._bare_network(model.get_base_model()).parameters())


@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter"])
def test_merged_base_of_a_transformers_network(way, tmp_path):
    bare, x = tiny_nafnet(), torch.rand(1, 3, 16, 16)
    if way == "get_peft_model":
        model = adapted(bare, ranks=2)
    elif Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"transformers needs peft>={MIN_PEFT_VERSION} for its own adapter methods")
    else:
        model = copy.deepcopy(bare)
        model.add_adapter(CoLoRAConfig(ranks=1, init_weights=False))
    with torch.no_grad():
        expected = model.eval()(x).reconstruction
        config = save_as_lora(tmp_path / "lora", model, merged_base=tmp_path / "base")
        assert files(tmp_path / "base") == ["config.json", "model.safetensors"]
        base = type(bare).from_pretrained(config.base_model_name_or_path).eval()
        close(loaded(base, tmp_path / "lora")(x).reconstruction, expected)
        assert torch.equal(model(x).reconstruction, expected)


def test_files_are_as_readable_as_any_new_file_and_others_in_the_folder_stay(tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "README.md").write_text("a card")
    save_as_lora(tmp_path / "lora", adapted(network()[0]), merged_base=tmp_path / "base")
    assert files(tmp_path / "lora") == ["README.md", "adapter_config.json", WEIGHTS]
    modes = {path: path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()}
    assert len(modes) == 4 and set(modes.values()) == {modes[tmp_path / "lora" / "README.md"]}


def test_the_working_directory_takes_an_adapter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_as_lora(".", adapted(plain()[0]))
    assert files(tmp_path) == ["adapter_config.json", WEIGHTS]


def test_failed_write_leaves_no_file_and_the_live_network_as_it_was(tmp_path, monkeypatch):
    bare, x = network()
    model = adapted(bare)
    expected, keys = model(x), list(model.state_dict())
    monkeypatch.setattr(LoraConfig, "save_pretrained", None)  # the last of all writes
    with pytest.raises(TypeError, match="not callable"):
        save_as_lora(tmp_path / "lora", model, merged_base=tmp_path / "base")
    assert files(tmp_path) == []
    assert torch.equal(model(x), expected) and list(model.state_dict()) == keys


@needs_biases
@pytest.mark.parametrize(("bias", "lora_bias"), [("all", "all"), ("colora_only", "lora_only")])
def test_biases_go_along(bias, lora_bias, tmp_path):
    for (bare, x), ranks, merged_base in ((plain(), MIXED, None), (network(), 2, tmp_path / "base")):
        model = trained_whole(adapted(bare, bias=bias, ranks=ranks))
        assert save_as_lora(tmp_path / "lora", model, merged_base=merged_base).bias == lora_bias
        lora = loaded(restorer_of(merged_base) if merged_base else bare, tmp_path / "lora")
        close(lora(x), model(x))
        biases = {key for key in load_file(tmp_path / "lora" / WEIGHTS) if ".lora_" not in key}
        assert biases <= set(lora.state_dict())


@pytest.mark.parametrize("bias", ["none", pytest.param("all", marks=needs_biases)])
def test_modules_to_save_go_along(bias, tmp_path):
    bare, x = network()
    model = trained_whole(adapted(bare, modules_to_save=["head", "norm"], bias=bias))
    config = save_as_lora(tmp_path / "lora", model, merged_base=tmp_path / "base")
    base = restorer_of(tmp_path / "base")
    assert config.modules_to_save == ["head", "norm"] and torch.equal(base.head.weight, bare.head.weight)
    close(loaded(base, tmp_path / "lora")(x), model(x))


def test_one_of_two_adapters_whatever_is_active(tmp_path):
    bare, x = plain()
    model = adapted(bare, "rain", ranks={"conv": 2, "blocks.0.conv": 1, "mlp.conv": 1})
    rain = model(x)
    # Its copy of blocks.0 holds a layer that the other adapter wrapped.
    haze = CoLoRAConfig(ranks=1, target_modules=["mix"], modules_to_save=["blocks.0", "norm"], init_weights=False)
    model.add_adapter("haze", haze)
    model.set_adapter("haze")
    expected = {"rain": rain, "haze": trained_whole(model).eval()(x)}
    for name in expected:
        save_as_lora(tmp_path / name, model, name)
        close(loaded(bare, tmp_path / name)(x), expected[name])


def test_injected_adapters_and_the_tuner_itself(tmp_path):
    bare, x = network()
    model = adapted(bare)
    compiled = nn.Module()
    compiled._orig_mod = model  # as torch.compile wraps it
    injected = inject_adapter_in_model(CoLoRAConfig(ranks=1, init_weights=False), copy.deepcopy(bare))
    sources = {injected: injected, model.base_model: model, model.get_base_model(): model, compiled: model}
    for source, expected in sources.items():
        save_as_lora(tmp_path / "lora", source, merged_base=tmp_path / "base")
        close(loaded(restorer_of(tmp_path / "base"), tmp_path / "lora")(x), expected(x))


def test_refusals_name_culprit_and_remedy_and_write_nothing(tmp_path):
    bare, lora, base, file = Restorer(), tmp_path / "lora", tmp_path / "base", tmp_path / "file"
    model = adapted(bare, "rain")
    model.add_adapter("fog", CoLoRAConfig(ranks={"up": 1, "head": 1}))
    stock = get_peft_model(copy.deepcopy(bare), LoraConfig(target_modules=["gate"]))
    model.peft_config["rain"].base_model_name_or_path = str(tmp_path)
    file.touch()
    cases = [
        (TypeError, "Restorer carries no PEFT adapters", (lora, bare, "rain", base)),
        (ValueError, "no CoLoRA adapter 'snow': choose one of 'rain', 'fog'", (lora, model, "snow", base)),
        (ValueError, "no CoLoRA adapter 'default': choose one of none", (lora, stock, "default", base)),
        (ValueError, "2 of the 2 layers.*'fog'.*merge_and_unload.*'up': .*'head': ", (lora, model, "fog", base)),
        (ValueError, "file' is a file: choose a folder", (lora, model, "rain", file)),
        (ValueError, "with the adapter: choose another", (lora, model, "rain", base / ".." / "lora")),
        (ValueError, "with the original base: choose another", (lora, model, "rain", tmp_path)),
    ]
    for error, match, arguments in cases:
        with pytest.raises(error, match=match):
            save_as_lora(*arguments)
    model.merge_adapter(["fog"])
    with pytest.raises(ValueError, match="'fog' is merged into layer 'up': call unmerge_adapter"):
        save_as_lora(lora, model, "rain", base)
    assert files(tmp_path) == ["file"]
