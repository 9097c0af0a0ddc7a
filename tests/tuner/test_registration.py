"""PEFT knows CoLoRA after one import, in any order and however often."""

import copy
import enum
import importlib
import pickle
import subprocess
import sys

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType

import colora_peft
from colora_peft.tuner import registration


def test_member_behaves_as_those_peft_defines():
    member = PeftType.COLORA
    assert member is PeftType("COLORA") is PeftType["COLORA"] is registration.COLORA
    assert member == "COLORA" and isinstance(member, PeftType)
    assert (member.name, member.value) == ("COLORA", "COLORA")
    assert list(PeftType).count(member) == 1 and member in PeftType and "COLORA" in list(PeftType)
    assert "COLORA" in PeftType.__members__ and dir(PeftType).count("COLORA") <= 1
    assert repr(member) == repr(PeftType.LORA).replace("LORA", "COLORA")
    assert hash(member) == hash("COLORA")
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member
    with pytest.raises(ValueError):
        PeftType("COLORAS")


def test_member_equals_one_that_the_enum_was_born_with():
    """Field by field, so that a Python version that keeps more about members makes this fail."""

    class Born(str, enum.Enum):
        LORA = "LORA"
        COLORA = "COLORA"

    class Grown(str, enum.Enum):
        LORA = "LORA"

    added = registration.add_peft_type(Grown, "COLORA")
    assert registration.add_peft_type(Grown, "COLORA") is added
    assert list(Grown.__members__) == list(Born.__members__)
    assert [member.value for member in Grown] == [member.value for member in Born]
    assert vars(added).keys() == vars(Born.COLORA).keys()
    assert added._sort_order_ == getattr(Born.COLORA, "_sort_order_", 1)
    for field in ("_member_names_", "_hashable_values_", "_unhashable_values_"):
        assert getattr(Grown, field, None) == getattr(Born, field, None)
    assert Grown._value2member_map_.keys() == Born._value2member_map_.keys()


def test_method_is_registered():
    assert PEFT_TYPE_TO_CONFIG_MAPPING["COLORA"] is colora_peft.CoLoRAConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.COLORA] is colora_peft.CoLoRAModel


def test_reload_changes_nothing():
    before = list(PeftType)
    importlib.reload(registration)
    importlib.reload(colora_peft)
    assert list(PeftType) == before
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.COLORA] is colora_peft.CoLoRAModel


def test_second_import_after_forgetting_the_first(tmp_path):
    """A notebook that purges sys.modules; and PEFT that has met a COLORA file before the package was there."""
    program = f"""
import sys, json, pathlib
from peft import PeftConfig
path = pathlib.Path({str(tmp_path)!r})
content = {{"peft_type": "COLORA", "parameter_budget": 0.5, "method_version": 2}}
(path / "adapter_config.json").write_text(json.dumps(content))
try:
    PeftConfig.from_pretrained(path)
    raise SystemExit("PEFT knew COLORA before the import")
except KeyError:
    pass
import colora_peft
first = colora_peft.CoLoRAModel
assert PeftConfig.from_pretrained(path).parameter_budget == 0.5
for name in [name for name in sys.modules if name.startswith("colora_peft")]:
    del sys.modules[name]
import colora_peft
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING, PeftType
assert first is not colora_peft.CoLoRAModel is PEFT_TYPE_TO_TUNER_MAPPING["COLORA"]
assert list(PeftType).count("COLORA") == 1
assert type(PeftConfig.from_pretrained(path)) is colora_peft.CoLoRAConfig
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_method_of_another_package_is_not_overwritten():
    class Stranger:
        pass

    with pytest.raises(ImportError, match="already has a method COLORA from colora_peft.tuner.model"):
        registration.register_colora(colora_peft.CoLoRAConfig, Stranger)


def test_old_peft_is_refused_in_one_sentence():
    with pytest.raises(ImportError, match=r"needs peft>=0.18 but found peft 0.17.1: run `pip install -U peft`\.$"):
        registration.check_peft_version("0.17.1")
    registration.check_peft_version("0.18.0")
