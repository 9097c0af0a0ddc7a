"""Checks of a network before it is tuned: what would show only after hours is refused in the first seconds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from colora_peft.hub import is_function, load_backbone
from colora_peft.inference import evaluation_mode, needed_multiple, reconstruct
from colora_peft.tuner import base_fingerprint, is_other_base

from .loop import TrainingDiverged
from .methods import ADAPTER_METHODS, Method


def check_takes_images(model: nn.Module, name_or_path: str, side: int) -> None:
    """Refuses a network that does not restore a grey square, by running it once.

    Args:
        model: The network.
        name_or_path: Its name, for the message.
        side: Side of the training patches in pixels, which it must take; rounded up to what the network needs.

    Raises:
        ValueError: It does not restore RGB images, does not keep their shape, or returns NaN or infinite values.
        TypeError: It returns something else than images.
    """
    images = _grey_square(model, side)
    try:
        restored = _run(model, images)
    except torch.OutOfMemoryError:  # says nothing about the network
        raise
    except (RuntimeError, AssertionError, AttributeError, LookupError, ValueError) as error:  # their refusals
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{name_or_path} does not restore RGB images of shape {tuple(images.shape)}: {reason}"
        ) from error
    if not restored.isfinite().all():
        raise ValueError(
            f"{name_or_path} returns NaN or infinite values for a grey image, before any training: its weights are "
            "broken."
        )


def check_result_is_finite(model: nn.Module, side: int, num_steps: int, learning_rate: float) -> None:
    """Refuses a result that returns NaN or infinite values: no loss follows the last step that would show it.

    Args:
        model: The trained network.
        side: Side in pixels of the grey square that it is run on.
        num_steps: Number of its training steps, for the message.
        learning_rate: Its learning rate, for the message.

    Raises:
        TrainingDiverged: It does.
    """
    if not _run(model, _grey_square(model, side)).isfinite().all():
        raise result_diverged(num_steps, learning_rate)


def result_diverged(num_steps: int, learning_rate: float) -> TrainingDiverged:
    """The error of a result that returns NaN or infinite values."""
    return TrainingDiverged(
        f"The network returns NaN or infinite values after {num_steps} steps, so its result is not saved. Start again "
        f"with a lower --learning_rate than {learning_rate:g}."
    )


def _grey_square(model: nn.Module, side: int) -> Tensor:
    side += -side % needed_multiple(model)
    return torch.full((1, 3, side, side), 0.5, device=next(model.parameters(), torch.empty(0)).device)


def _run(model: nn.Module, images: Tensor) -> Tensor:
    with evaluation_mode(model), torch.no_grad():
        return reconstruct(model, images)


def check_base_can_be_made_again(model: nn.Module, method: Method, name_or_path: str) -> None:
    """Refuses to train an adapter on what a function returns once only: no later call would give its base.

    Methods without an adapter save the network itself, which no function then has to return.

    Args:
        model: The network that `load_backbone` made.
        method: The method that is to train it.
        name_or_path: Name of the network, by which it is made once more if that is a function.

    Raises:
        ValueError: The function returns other weights at each call.
    """
    if method not in ADAPTER_METHODS or not is_function(name_or_path):
        return
    with torch.random.fork_rng(devices=[]):  # PyTorch's generator on the CPU is as it was afterwards
        again = load_backbone(name_or_path)
    if is_other_base(base_fingerprint(model), base_fingerprint(again)):
        raise ValueError(
            f"{name_or_path} returns other weights at each call: seed what it draws, or load it from a file."
        )
