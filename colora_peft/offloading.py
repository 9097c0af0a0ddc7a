"""Layers whose weights Accelerate keeps on the CPU or the disk between calls (`device_map`, `cpu_offload`)."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["is_offloaded", "onloaded"]


def is_offloaded(layer: nn.Module) -> bool:
    """Whether the weights of `layer` itself are elsewhere between its calls."""
    hook = layer.__dict__.get("_hf_hook")
    # The outermost module has several hooks in one.
    return any(getattr(part, "offload", False) for part in getattr(hook, "hooks", (hook,)))


@contextmanager
def onloaded(layer: nn.Module) -> Iterator[None]:
    """The weights of `layer` and of all inside it on the device where it runs."""
    hooked = [module for module in layer.modules() if is_offloaded(module)]
    try:
        for module in hooked:
            module._hf_hook.pre_forward(module)
        yield
    finally:
        for module in hooked:
            module._hf_hook.post_forward(module, None)
