"""One network object under several adapters: each model runs its own adapter, or the second is refused."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import colora_peft
from colora_peft import CoLoRAConfig
from colora_peft.restore import AdapterSet


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1)).eval()


@pytest.fixture
def folders(tmp_path):
    for seed, name in enumerate(("rain", "noise")):
        torch.manual_seed(seed)
        get_peft_model(network(), CoLoRAConfig(ranks=1, init_weights=False)).save_pretrained(tmp_path / name)
    return tmp_path / "rain", tmp_path / "noise"


@pytest.mark.parametrize("name", ["default", "noise"])
def test_a_base_that_carries_an_adapter_is_refused_and_the_first_model_stays(folders, name):
    base, x = network(), torch.rand(1, 3, 9, 9)
    rain = colora_peft.load(folders[0], base=base)
    expected = rain(x)
    remedy = r"carries adapter 'default'.*base=model, adapter_name='(default_2|noise)'"
    for taken in (base, rain.get_base_model()):
        with pytest.raises(ValueError, match=remedy):
            colora_peft.load(folders[1], base=taken, adapter_name=name)
    assert torch.equal(rain(x), expected)


def test_what_the_error_says_works(folders):
    base, x = network(), torch.rand(1, 3, 9, 9)
    alone = [colora_peft.load(folder, base=copy.deepcopy(base))(x) for folder in folders]
    model = colora_peft.load(folders[0], base=base)
    colora_peft.load(folders[1], base=model, adapter_name="noise")
    for name, expected in zip(("default", "noise", "default"), (*alone, alone[0]), strict=True):
        model.set_adapter(name)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)


def test_a_base_with_an_adapter_of_another_method_is_refused(folders):
    base = network()
    get_peft_model(base, LoraConfig(r=1, target_modules=["0"]))
    with pytest.raises(ValueError, match="carries adapter 'default' already"):
        colora_peft.load(folders[0], base=base)
    with pytest.raises(ValueError, match="carries adapter 'default' already: pass the bare one"):
        AdapterSet(base, {"rain": folders[0]})


@pytest.mark.parametrize("name, fate", [("default", "is replaced"), ("noise", "shares its layers")])
def test_peft_on_a_network_that_carries_an_adapter_warns(folders, name, fate):
    base = network()
    PeftModel.from_pretrained(base, folders[0])
    with pytest.warns(UserWarning, match=f"carries adapter 'default' already, which {fate}"):
        PeftModel.from_pretrained(base, folders[1], adapter_name=name)


def test_a_network_whose_adapters_are_gone_takes_another_without_a_word(folders, recwarn):
    base = network()
    bare = PeftModel.from_pretrained(base, folders[0]).unload()
    PeftModel.from_pretrained(bare, folders[1])
    assert not [warning for warning in recwarn if "carries adapter" in str(warning.message)]
