"""Checks of a network before and after its training: what would show only after hours is refused at once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from colora_peft.hub import is_function, load_backbone
from colora_peft.inference import evaluation_mode, needed_multiple, reconstruct
from colora_peft.ranks import adaptable_layers, check_pays_for_a_rank, common_rank, weight_matrix_shape
from colora_peft.tuner import base_fingerprint, is_other_base

from .loop import TrainingDiverged
from .methods import ADAPTER_METHODS, Method

_OF_THE_MACHINE = re.compile("allocate memory|CUDA error|cuDNN|NCCL", re.IGNORECASE)


def check_takes_images(model: nn.Module, name_or_path: str, side: int) -> None:
    """Refuses a network that does not restore a square with a ramp of grey, by running it once.

    Args:
        model: The network.
        name_or_path: Its name, for the message.
        side: Side of the training patches in pixels, which it must take; rounded up to what the network needs.

    Raises:
        ValueError: It does not restore RGB images, does not keep their shape, or returns NaN or infinite values.
        TypeError: It returns something else than images.
    """
    images = _grey_ramp(model, side)
    with refusals_in_words(f"{name_or_path} does not restore RGB images of shape {tuple(images.shape)}", ValueError):
        restored = _run(model, images)
    if not restored.isfinite().all():
        raise ValueError(
            f"{name_or_path} returns NaN or infinite values for a ramp of grey, before any training: its weights are "
            "broken."
        )


@contextmanager
def refusals_in_words(sentence: str, *more: type[Exception], remedy: str = "") -> Iterator[None]:
    """Has what a network raises for images that it does not take follow a sentence that names it.

    Args:
        sentence: The words before the reason, which is the first line of the network's own.
        more: Further kinds of errors that are the network's.
        remedy: Words in brackets after it.

    Raises:
        ValueError: The body raised an error of the kinds by which networks refuse images. What tells of memory or of a
            GPU passes as it is.
    """
    try:
        yield
    except (RuntimeError, AssertionError, AttributeError, LookupError, *more) as error:
        if isinstance(error, torch.OutOfMemoryError) or _OF_THE_MACHINE.search(str(error)):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{sentence}: {reason}" + (remedy and f" ({remedy})")) from error


def check_budget(model: nn.Module, method: Method, parameter_budget: float) -> None:
    """Refuses a budget that no scores would make enough, before any are measured.

    Args:
        model: The network.
        method: The method that is to train it; those without an adapter have no budget.
        parameter_budget: Share of the weights of its adaptable layers, in (0, 1].

    Raises:
        ValueError: It pays for no rank ("colora"), or not for rank 1 in every layer ("lora"); or there is no layer to
            adapt.
    """
    if method in ADAPTER_METHODS:
        shapes = [weight_matrix_shape(layer) for layer in adaptable_layers(model).values()]
        check_pays_for_a_rank(shapes, parameter_budget)
        if method == "lora":
            common_rank(shapes, parameter_budget)


def check_result_is_finite(model: nn.Module, side: int, num_steps: int, learning_rate: float) -> None:
    """Refuses a result that returns NaN or infinite values: no loss follows the last step that would show it.

    Args:
        model: The trained network.
        side: Side in pixels of the square that it is run on.
        num_steps: Number of its training steps, for the message.
        learning_rate: Its learning rate, for the message.

    Raises:
        TrainingDiverged: It does.
    """
    if not _run(model, _grey_ramp(model, side)).isfinite().all():
        raise result_diverged(num_steps, learning_rate)


def result_diverged(num_steps: int, learning_rate: float) -> TrainingDiverged:
    """The error of a result that returns NaN or infinite values."""
    return TrainingDiverged(
        f"The network returns NaN or infinite values after {num_steps} steps, so its result is not saved. Start again "
        f"with a lower --learning_rate than {learning_rate:g}."
    )


def _grey_ramp(model: nn.Module, side: int) -> Tensor:
    """Not one grey alone, which a network that divides by an image's own deviation could not restore."""
    side += -side % needed_multiple(model)
    device = next(model.parameters(), torch.empty(0)).device
    return torch.linspace(0, 1, side, device=device).expand(1, 3, side, side).contiguous()


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
