"""Registration of CoLoRA with PEFT: the only file that changes PEFT's registry and its enum of methods.

PEFT finds a method through the enum `PeftType`, which is closed, and through four dictionaries filled by
`register_peft_method`. Both steps are safe to repeat: a second import or a reload changes nothing or replaces
this package's own entry.
"""

import importlib.metadata

from packaging.version import Version

MINIMUM_PEFT = "0.18"
"""First version in which PEFT's BaseTuner has the boiler-plate of a method, which this package builds upon."""


def check_peft_version(installed: str) -> None:
    """Refuses a PEFT that is too old to build upon."""
    if Version(installed) < Version(MINIMUM_PEFT):
        raise ImportError(
            f"The package colora_peft needs peft>={MINIMUM_PEFT} but found peft {installed}: "
            "run `pip install -U peft`."
        )


check_peft_version(importlib.metadata.version("peft"))

from peft.mapping import (  # noqa: E402  (the version is checked first, so that the error is ours and clear)
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import PeftType, register_peft_method  # noqa: E402


def add_peft_type(enum_class: type[PeftType], name: str) -> PeftType:
    """Returns member `name` (its value is its name) of a string enum, adding it if it is not there yet.

    Python has no public way to add to an enum. The fields set here are those which `enum.EnumType` sets itself
    in Python 3.10 to 3.14.
    """
    if name in enum_class.__members__:
        return enum_class[name]
    member = str.__new__(enum_class, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = enum_class
    member._sort_order_ = len(enum_class._member_names_)
    # EnumType.__setattr__ guards members; before 3.11 attribute access goes through _member_map_, since then
    # through a class attribute. Setting both serves all.
    type.__setattr__(enum_class, name, member)
    enum_class._member_names_.append(name)
    enum_class._member_map_[name] = member
    enum_class._value2member_map_[name] = member
    if hasattr(enum_class, "_hashable_values_"):  # newer Pythons look here for `value in Enum`
        enum_class._hashable_values_.append(name)
    return member


COLORA: PeftType = add_peft_type(PeftType, "COLORA")


def register_colora(config_class: type, model_class: type) -> None:
    """Enters the method into PEFT's dictionaries; entries of an earlier import of this package are replaced.

    Raises:
        ImportError: Another package has registered a method called COLORA.
    """
    earlier = PEFT_TYPE_TO_TUNER_MAPPING.get(COLORA)
    if earlier is model_class:
        return
    if earlier is not None:
        if earlier.__module__ != model_class.__module__:
            raise ImportError(
                f"PEFT already has a method COLORA from {earlier.__module__}: import only one of it and colora_peft."
            )
        del PEFT_TYPE_TO_TUNER_MAPPING[COLORA], PEFT_TYPE_TO_CONFIG_MAPPING[COLORA]
        del PEFT_TYPE_TO_PREFIX_MAPPING[COLORA]
    register_peft_method(name="colora", config_cls=config_class, model_cls=model_class, prefix="colora_")
