"""Another adapter for each sample of a batch: its names reach the layers past the network's own forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from colora_peft.utils import register_for_this_thread, some

from .layer import CoLoRALayer, adapted_layers
from .peft_internals import adapters_with_own_copy

BASE_NAME = "__base__"
"""Name in `adapter_names`, as in PEFT, of a sample that gets no adapter."""


@contextmanager
def adapters_by_sample(tuner: BaseTuner, adapter_names: list[str]) -> Iterator[None]:
    """Context in which this thread calls each layer of the network with `adapter_names`, one for each sample."""
    _check_mixed_batch(tuner, adapter_names)
    hooks = []
    try:
        for name, module in tuner.model.named_modules():
            if isinstance(module, CoLoRALayer | AuxiliaryTrainingWrapper):
                if isinstance(module, CoLoRALayer):
                    module.adapters_of_batch = set(adapter_names)
                hook = partial(_pass_adapter_names, name, list(adapter_names))
                register = partial(module.register_forward_pre_hook, with_kwargs=True)
                hooks.append(register_for_this_thread(register, hook))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in adapted_layers(tuner.model).values():
            layer.adapters_of_batch = None


def _pass_adapter_names(
    name: str, adapter_names: list[str], module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """Hook before the forward pass of layer `name`, which gets `adapter_names` as an argument."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        # PEFT's wrapper of modules_to_save fails on adapters that have no copy of their own.
        own = adapters_with_own_copy(module)
        adapter_names = [adapter if adapter in own else BASE_NAME for adapter in adapter_names]
    if args and args[0].shape[0] != len(adapter_names):
        raise ValueError(
            f"The adapter_names are {len(adapter_names)} but layer {name!r} receives {args[0].shape[0]} samples: give "
            "one name for each sample; a network that folds other dimensions into the batch cannot mix adapters."
        )
    return args, {**kwargs, "adapter_names": adapter_names}


def _check_mixed_batch(tuner: BaseTuner, adapter_names: list[str]) -> None:
    if isinstance(adapter_names, str) or not adapter_names:
        raise ValueError(f"The adapter_names are {adapter_names!r}: give a list with one name for each sample.")
    if tuner.training:
        raise ValueError("A batch with adapter_names is for inference: call model.eval() first.")
    if any(layer.merged for layer in adapted_layers(tuner.model).values()):
        raise ValueError("A batch with adapter_names needs the adapters unmerged: call unmerge_adapter() first.")
    unknown = sorted(set(adapter_names) - set(tuner.peft_config) - {BASE_NAME})
    if unknown:
        raise ValueError(
            f"The adapter_names name {some(unknown)}, but the adapters are {some(sorted(tuner.peft_config))}; "
            f'"{BASE_NAME}" runs a sample without any.'
        )
