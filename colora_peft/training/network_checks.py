"""Checks of a network before it is tuned: what would show only after hours is refused in the first seconds."""

from __future__ import annotations

import torch
from torch import nn

from colora_peft.hub import is_function, load_backbone
from colora_peft.inference import evaluation_mode, needed_multiple, reconstruct
from colora_peft.tuner import base_fingerprint, is_other_base

from .methods import ADAPTER_METHODS, Method


def check_takes_images(model: nn.Module, name_or_path: str, side: int) -> None:
    """Refuses a network that does not restore a grey square, by running it once.

    Args:
        model: The network.
        name_or_path: Its name, for the message.
        side: Side of the training patches in pixels, which it must take; rounded up to what the network needs.

    Raises:
        ValueError: It does not take RGB images, or does not keep their shape.
        TypeError: It returns something else than images.
    """
    side += -side % needed_multiple(model)
    weight = next(model.parameters(), torch.empty(0))
    images = torch.full((1, 3, side, side), 0.5, device=weight.device)
    try:
        with evaluation_mode(model), torch.no_grad():
            reconstruct(model, images)
    except torch.OutOfMemoryError:  # says nothing about the network
        raise
    except (RuntimeError, AssertionError, AttributeError, LookupError) as error:  # how networks refuse sizes, too
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{name_or_path} does not take RGB images of shape {tuple(images.shape)}: {reason}"
        ) from error


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
