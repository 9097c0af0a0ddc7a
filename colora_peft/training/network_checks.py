"""Checks of a network before it is tuned: what would show only after hours is refused in the first seconds."""

from __future__ import annotations

import torch
from torch import nn

from colora_peft.hub import is_function, load_backbone
from colora_peft.tuner import base_fingerprint, is_other_base

from .methods import ADAPTER_METHODS, Method


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
    with torch.random.fork_rng(devices=[]):  # the run is the same with and without this check
        again = load_backbone(name_or_path)
    if is_other_base(base_fingerprint(model), base_fingerprint(again)):
        raise ValueError(
            f"{name_or_path} returns other weights at each call: seed what it draws, or load it from a file."
        )
