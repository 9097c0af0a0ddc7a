"""Layers whose weights Accelerate keeps on the CPU or the disk between calls (`device_map`, `cpu_offload`)."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from colora_peft.utils import some


def is_offloaded(layer: nn.Module) -> bool:
    """Returns whether the weights of `layer` itself are elsewhere between its calls."""
    hook = layer.__dict__.get("_hf_hook")
    # The outermost module has several hooks in one.
    return any(getattr(part, "offload", False) for part in getattr(hook, "hooks", (hook,)))


@contextmanager
def onloaded(layer: nn.Module) -> Iterator[None]:
    """Context in which the weights of `layer` and of all inside it are on the device where it runs."""
    with ExitStack() as entered:
        for module in layer.modules():
            if is_offloaded(module):
                module._hf_hook.pre_forward(module)
                entered.callback(module._hf_hook.post_forward, module, None)
        yield


def check_nothing_offloaded(model: nn.Module, what: str) -> None:
    """Checks that all weights of `model` are in memory.

    The operation `what` reads or replaces them. Offloaded weights have no values, and Accelerate would undo changes.
    """
    offloaded = [name or type(model).__name__ for name, module in model.named_modules() if is_offloaded(module)]
    if offloaded:
        raise ValueError(
            f"{what} needs all weights in memory, but {some(offloaded)} are offloaded (device_map, cpu_offload): load "
            "the network without a device_map that offloads, do it there, and dispatch it afterwards."
        )
