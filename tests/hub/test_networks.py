"""Networks from a folder and from a function of the user's."""

import shutil
import subprocess
import sys

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageToImage

import colora_peft
import colora_peft.models  # noqa: F401 - registers the backbones
from colora_peft import CoLoRAConfig
from colora_peft.hub.networks import load_backbone

NETWORKS = """
from torch import nn

def convolution():
    return nn.Conv2d(3, 3, 3, padding=1).half().train()

def two_layers():
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 1))

def number():
    return 3

def drawn():
    return nn.Sequential(nn.Conv2d(3, 3, 3))

def with_path(path):
    return nn.Conv2d(3, 3, 3)

def broken():
    raise RuntimeError("no weights today")
"""


@pytest.fixture
def networks(tmp_path, monkeypatch):
    (tmp_path / "my_networks.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in ("my_networks", "needs_more"):
        sys.modules.pop(name, None)


def test_a_folder_gives_what_transformers_gives(tiny_nafnet):
    expected = AutoModelForImageToImage.from_pretrained(tiny_nafnet, dtype=torch.float32)
    loaded = load_backbone(str(tiny_nafnet))
    assert not loaded.training
    for (name, weight), (expected_name, expected_weight) in zip(
        loaded.state_dict().items(), expected.state_dict().items(), strict=True
    ):
        assert name == expected_name and weight.dtype == torch.float32 and torch.equal(weight, expected_weight)


def test_an_adapter_in_the_same_folder_is_refused_and_not_put_on(tiny_nafnet, tmp_path):
    """transformers would attach it; the network would not be the bare one that adapters and fingerprints are about."""
    shutil.copytree(tiny_nafnet, tmp_path / "both")
    get_peft_model(load_backbone(str(tiny_nafnet)), CoLoRAConfig(ranks=1)).save_pretrained(tmp_path / "both")
    with pytest.raises(ValueError, match="move adapter_config.json and its weights to a folder of their own"):
        load_backbone(str(tmp_path / "both"))
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "both" / name).rename(tmp_path / "adapter" / name)
    bare = load_backbone(str(tmp_path / "both"))
    assert colora_peft.load(tmp_path / "adapter", base=bare).get_base_model() is bare


def test_a_function_in_the_current_directory_is_called(networks):
    network = load_backbone("my_networks:convolution")
    assert isinstance(network, nn.Conv2d)
    assert network.weight.dtype == torch.float32 and not network.training


def test_an_adapter_keeps_the_name_of_the_function_that_makes_its_base(networks, tmp_path):
    adapted = get_peft_model(load_backbone("my_networks:two_layers"), CoLoRAConfig(ranks=1))
    adapted.save_pretrained(tmp_path / "adapter")
    base = PeftConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path
    assert base == "my_networks:two_layers"
    PeftModel.from_pretrained(load_backbone(base), tmp_path / "adapter")


@pytest.mark.parametrize("as_name", [True, False])
def test_a_base_that_its_function_does_not_give_again_is_said_to_be_the_function_s_fault(networks, tmp_path, as_name):
    """The name that the adapter has for its base was given: to ask for it would lead nowhere."""
    name = "my_networks:drawn"
    get_peft_model(load_backbone(name), CoLoRAConfig(ranks=1)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"other weights than {name} returns now.*: seed what it draws, or") as caught:
        colora_peft.load(tmp_path / "adapter", base=name if as_name else load_backbone(name))
    assert "base=" not in str(caught.value)
    with pytest.raises(ValueError, match=f"another network .*Pass base=, the one that it calls '{name}'"):
        colora_peft.load(tmp_path / "adapter", base=nn.Sequential(nn.Conv2d(3, 3, 3)))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("my_networks:missing", ValueError, "has no function missing"),
        ("no_such_module:network", ValueError, "no module no_such_module"),
        ("my_networks.below:network", ValueError, "no module my_networks.below"),
        ("my_networks:number", TypeError, "returned int"),
        ("my_networks:with_path", ValueError, "my_networks:with_path must be a function without arguments: .*'path'"),
        ("my_networks:broken", RuntimeError, "no weights today"),
    ],
)
def test_a_function_that_gives_no_network_is_named(networks, name, error, message):
    with pytest.raises(error, match=message):
        load_backbone(name)


def test_an_import_that_is_missing_inside_the_module_is_not_blamed_on_the_module(networks, tmp_path):
    (tmp_path / "needs_more.py").write_text("import not_installed_anywhere")
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        load_backbone("needs_more:network")


def test_a_function_has_no_revision(networks):
    with pytest.raises(ValueError, match="leave out revision and subfolder"):
        load_backbone("my_networks:convolution", revision="v1")


def test_the_backbones_are_registered_without_importing_them(tiny_nafnet, tmp_path):
    code = f"from colora_peft.hub.networks import load_backbone; load_backbone({str(tiny_nafnet)!r})"
    # Away from the source tree, which `python -c` would import instead of the package that is installed.
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_file_that_lacks_weights_is_refused(tiny_nafnet, tmp_path):
    """transformers would leave them random: as when a compiled network was saved with the names of its wrapper."""
    shutil.copytree(tiny_nafnet, tmp_path / "network")
    file = tmp_path / "network" / "model.safetensors"
    save_file({f"_orig_mod.{name}": tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights of .* more: its file is of another network"):
        load_backbone(str(tmp_path / "network"))
