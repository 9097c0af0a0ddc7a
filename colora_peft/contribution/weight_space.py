"""A network's walk through weight space and its way back, which every estimator uses.

The moving parameters are all those of floating point, frozen or not. They are named as `named_parameters` names them:
a tied parameter once, under its first name.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from colora_peft.utils import some


def moving_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that have a path, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.is_floating_point()}


def sum_dtype(value: Tensor) -> torch.dtype:
    """Returns the type to sum and interpolate in: at least float32, also for weights in half precision."""
    return torch.promote_types(value.dtype, torch.float32)


@torch.no_grad()
def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies `weights` into the model's own parameter tensors, which keep their identity."""
    for name, parameter in moving_parameters(model).items():
        parameter.copy_(weights[name])


@torch.no_grad()
def load_path_point(model: nn.Module, start: Mapping[str, Tensor], end: Mapping[str, Tensor], t: float) -> None:
    """Sets the model's weights to start + t (end - start)."""
    for name, parameter in moving_parameters(model).items():
        first = start[name].to(sum_dtype(parameter))
        parameter.copy_(first.lerp(end[name].to(first), t))


@dataclass(frozen=True)
class BufferCopies:
    """The buffers of a model as they were at some moment."""

    modules: list[tuple[nn.Module, dict[str, Tensor | None]]]
    """The buffers that each module holds itself: the tensors, which a forward pass may exchange."""
    values: list[tuple[Tensor, Tensor]]
    """Each of these tensors and a copy of its value."""

    @classmethod
    def of(cls, model: nn.Module) -> BufferCopies:
        """Returns copies of the buffers of `model` as they are now."""
        modules = [(module, dict(module._buffers)) for module in model.modules()]
        return cls(modules, [(buffer, buffer.detach().clone()) for buffer in model.buffers()])

    @torch.no_grad()
    def reset(self) -> None:
        """Puts the buffers and their values back."""
        for buffer, value in self.values:
            buffer.copy_(value)
        for module, own_buffers in self.modules:
            module._buffers.update(own_buffers)


@contextmanager
def put_back_afterwards(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Context in which a model is free to move; on exit, also by an exception, it is as it was, bit for bit.

    Inside, it is in eval mode, all moving parameters are trainable, and `.grad` is empty. Put back are weights,
    buffers, `requires_grad`, `.grad`, the training mode of each module, and the RNGs of Python, NumPy and torch (CPU
    and GPUs in use). Yields copies of the moving parameters by name: theta0.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    modes = [(module, module.training) for module in model.modules()]
    buffers = BufferCopies.of(model)
    parameters = moving_parameters(model)
    flags = {name: (parameter.requires_grad, parameter.grad) for name, parameter in parameters.items()}
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        model.eval()
        for parameter in parameters.values():
            parameter.requires_grad_(True)
            parameter.grad = None
        with torch.random.fork_rng(gpus), torch.enable_grad():
            yield start
    finally:
        load_weights(model, start)
        for name, (required_grad, grad) in flags.items():
            parameters[name].grad = grad
            parameters[name].requires_grad_(required_grad)
        buffers.reset()
        for module, was_training in modes:
            module.training = was_training
        torch.clear_autocast_cache()
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def seed_rngs(seed: int) -> None:
    """Seeds exactly the generators that `put_back_afterwards` puts back."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def checked_end_weights(model: nn.Module, end_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the entries of `end_state` for the moving parameters.

    Raises:
        ValueError: An entry is missing, unexpected, of another shape, or not finite (named); or no weight differs
            from the model's.
    """
    parameters = moving_parameters(model)
    missing = [name for name in parameters if name not in end_state]
    known = {*model.state_dict(), *(name for name, _ in model.named_parameters(remove_duplicate=False))}
    unexpected = [name for name in end_state if name not in known]
    if missing or unexpected:
        raise ValueError(
            f"The end weights do not fit the model (missing: {some([*map(repr, missing)], 5)}; unexpected: "
            f"{some([*map(repr, unexpected)], 5)}): pass the state_dict() of the same network after tuning."
        )
    in_use = {parameter.data_ptr() for parameter in parameters.values()}
    end, has_moved = {}, False
    for name, parameter in parameters.items():
        value = end_state[name].detach()
        if value.shape != parameter.shape:
            raise ValueError(
                f"End weight '{name}' has shape {tuple(value.shape)}, the model's has {tuple(parameter.shape)}: pass "
                "the state_dict() of the same network after tuning."
            )
        if not torch.isfinite(value).all():
            raise ValueError(f"End weight '{name}' holds NaN or Inf: the tuning diverged, lower its learning rate.")
        # An end weight that is the model's own tensor would move along with the walk.
        end[name] = value.clone() if value.data_ptr() in in_use else value
        has_moved = has_moved or not torch.equal(value.to(parameter), parameter)
    if not has_moved:
        raise ValueError(
            "The end weights equal the model's current weights, so nothing moved and every score would be 0: load the "
            "pre-trained weights into the model and pass the tuned ones as end_state."
        )
    return end
