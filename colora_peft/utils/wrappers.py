"""Wrappers that PyTorch and DeepSpeed put around a network: compilation, and sharing among processes."""

from __future__ import annotations

from torch import nn


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` was applied to the model or to a part of it, so that hooks may not run."""
    return any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in model.modules())


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside `torch.compile`, `DistributedDataParallel` and DeepSpeed's engine, in any order."""
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def _inside(model: nn.Module) -> nn.Module | None:
    is_shared_out = isinstance(model, nn.parallel.DistributedDataParallel)
    # By name: the import of DeepSpeed takes seconds.
    if is_shared_out or type(model).__name__ == "DeepSpeedEngine":
        return model.module
    return model._modules.get("_orig_mod")  # no `getattr`: a PeftModel would find that of a network inside
