"""Another adapter for each sample of a batch: how its names reach the layers, past the network's own forward."""

from typing import Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

__all__ = ["BASE_NAME", "pass_adapter_names"]

BASE_NAME = "__base__"
"""In `adapter_names`, as in PEFT: this sample gets no adapter."""


def pass_adapter_names(
    name: str, adapter_names: list[str], module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """Hook before the forward pass of layer `name`, which gets `adapter_names` as an argument.

    Raises:
        ValueError: Its input does not have one row for each name.
    """
    if isinstance(module, AuxiliaryTrainingWrapper):
        # PEFT's wrapper of modules_to_save fails on adapters that have no copy of their own.
        own = module._adapters
        adapter_names = [adapter if adapter in own else BASE_NAME for adapter in adapter_names]
    if args and args[0].shape[0] != len(adapter_names):
        raise ValueError(
            f"The adapter_names are {len(adapter_names)} but layer {name!r} receives {args[0].shape[0]} samples: give "
            "one name for each sample; a network that folds other dimensions into the batch cannot mix adapters."
        )
    return args, {**kwargs, "adapter_names": adapter_names}
