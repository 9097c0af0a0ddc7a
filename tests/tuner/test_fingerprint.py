"""A base is told from any other, and recognised in whatever it is wrapped."""

import copy
import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForImageToImage

import colora_peft.models  # noqa: F401 - registers the backbones
from colora_peft import CoLoRAConfig, hotswap_adapter
from colora_peft.tuner.fingerprint import base_fingerprint, is_other_base


class TinyNet(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 3, 3)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


KNOWN = base_fingerprint(TinyNet())

ADAPTERS = {
    "colora": CoLoRAConfig(ranks=2),
    "colora with modules_to_save": CoLoRAConfig(ranks=2, target_modules=["last"], modules_to_save=["first"]),
    "lora": LoraConfig(r=2, target_modules=["first"]),
}


@pytest.mark.parametrize("config", ADAPTERS.values(), ids=ADAPTERS)
def test_adapters_do_not_change_it(config):
    model = get_peft_model(TinyNet(), copy.deepcopy(config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    assert base_fingerprint(model.get_base_model()) == KNOWN


def test_where_and_how_the_weights_lie_does_not_change_it():
    assert base_fingerprint(TinyNet().to(memory_format=torch.channels_last)) == KNOWN
    assert base_fingerprint(torch.compile(TinyNet())) == KNOWN
    trained = TinyNet().train()
    trained(torch.rand(2, 3, 8, 8))  # moves the running statistics
    assert base_fingerprint(trained) == KNOWN


def smallest_change(net):
    net.last.bias.data[1] = torch.nextafter(net.last.bias.data[1], torch.tensor(2.0))


def same_bytes_in_another_shape(net):
    net.first.weight.data = net.first.weight.data.reshape(8, 3, 1, 9)


def same_bytes_under_other_names(net):
    net.extra, net.norm = net.norm, nn.Identity()


@pytest.mark.parametrize("change", [smallest_change, same_bytes_in_another_shape, same_bytes_under_other_names])
def test_any_other_network_differs(change):
    net = TinyNet()
    change(net)
    assert is_other_base(base_fingerprint(net), KNOWN)


@pytest.mark.parametrize("move", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda net: net.to("meta")])
def test_weights_that_are_not_there_in_float32_have_none(move):
    assert base_fingerprint(move(TinyNet())) is None


@pytest.mark.parametrize("other", [None, "sha256-float64:00"])
def test_what_cannot_be_compared_is_no_other_base(other):
    assert not is_other_base(KNOWN, other) and not is_other_base(other, KNOWN)


def test_half_precision_files_and_what_is_loaded_from_them_agree(tiny_nafnet, tmp_path):
    """The shipped network is stored as float16 and loads as float32: its fingerprint must not depend on the round."""
    model = AutoModelForImageToImage.from_pretrained(tiny_nafnet)
    model.save_pretrained(tmp_path, state_dict={name: tensor.half() for name, tensor in model.state_dict().items()})
    first, again = (AutoModelForImageToImage.from_pretrained(tmp_path) for _ in range(2))
    first.save_pretrained(tmp_path / "full")
    full = AutoModelForImageToImage.from_pretrained(tmp_path / "full")
    assert base_fingerprint(first) == base_fingerprint(again) == base_fingerprint(full) is not None


def test_merged_weights_are_refused():
    model = get_peft_model(TinyNet(), CoLoRAConfig(ranks=2, init_weights=False))
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into layer 'first'.*unmerge_adapter"):
        base_fingerprint(model.get_base_model())
    model.add_adapter("second", CoLoRAConfig(ranks=1))  # what it was before the merge is known
    assert model.peft_config["second"].base_fingerprint == KNOWN


def test_saved_with_the_adapter_and_compared_when_it_is_loaded(tmp_path):
    get_peft_model(TinyNet(), CoLoRAConfig(ranks=2)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_fingerprint"] == KNOWN
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PeftModel.from_pretrained(TinyNet(), tmp_path)
    with pytest.warns(UserWarning, match="'mine' was made for another network"):
        model = PeftModel.from_pretrained(TinyNet(seed=1), tmp_path, adapter_name="mine")
    with pytest.warns(UserWarning, match="'mine' was made for another network"):
        hotswap_adapter(model, tmp_path, "mine")


def test_trained_biases_do_not_change_what_was_noted():
    pytest.importorskip("peft", "0.21")
    model = get_peft_model(TinyNet(), CoLoRAConfig(ranks=2, bias="all"))
    with torch.no_grad():
        model.get_base_model().first.base_layer.bias.add_(1.0)
    model.add_adapter("second", CoLoRAConfig(ranks=1))
    assert model.peft_config["default"].base_fingerprint == model.peft_config["second"].base_fingerprint == KNOWN


def test_an_adapter_without_one_stays_without_where_it_is_only_used(tmp_path):
    get_peft_model(TinyNet(), CoLoRAConfig(ranks=2)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_fingerprint": None}))
    used = PeftModel.from_pretrained(TinyNet(seed=1), tmp_path)
    assert used.peft_config["default"].base_fingerprint is None
    trained = PeftModel.from_pretrained(TinyNet(seed=1), tmp_path, is_trainable=True)
    assert trained.peft_config["default"].base_fingerprint == base_fingerprint(TinyNet(seed=1))
