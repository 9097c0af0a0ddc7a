"""Checks that a saved adapter, loaded afresh, is the network that was measured: buffers that moved are not in it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn

from colora_peft.data import PairSource
from colora_peft.evaluation import psnr, restore_some
from colora_peft.hub import load_for_training
from colora_peft.utils import some

_SAME_PSNR_DB = 0.01
_SAME_LEVELS = 1e-3
"""Largest mean difference, a quarter of an 8-bit level: more than what devices and memory formats round."""


@dataclass(frozen=True)
class SavedDiffers:
    """A saved adapter that is not the network that was trained.

    Attributes:
        message: The difference and its cause, for the user.
        network: The base, loaded afresh, with the saved adapter; None if they do not go together.
    """

    message: str
    network: nn.Module | None = None


def compare_saved(model: PeftModel, folder: Path, base: str, pairs: PairSource) -> SavedDiffers | None:
    """Returns how the adapter in `folder`, on its base loaded afresh, differs from `model`; None if it does not.

    Args:
        model: The trained network.
        folder: Folder that `model` was saved in.
        base: Name of the base, as `load_backbone` takes it.
        pairs: Pairs to evaluate on; the first is restored by both.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself has warned of what can be known about the base
        try:
            loaded = load_for_training(folder, base=base).to(next(model.parameters()).device)  # of LoRA, too
        except ValueError as error:
            return SavedDiffers(f"Note: the saved adapter cannot be loaded onto {base}. {error}")
    trained, saved = (_restored(network, pairs) for network in (model, loaded))
    if abs(trained[1] - saved[1]) <= _SAME_PSNR_DB and (trained[0] - saved[0]).abs().mean() <= _SAME_LEVELS:
        return None
    moved = moved_buffers(model.get_base_model(), loaded.get_base_model())
    cause = f"training moved {some(moved)}, buffers that no adapter holds" if moved else "the base is not the same"
    return SavedDiffers(
        f"Note: the first image has {trained[1]:.2f} dB after training and {saved[1]:.2f} dB with the saved adapter, "
        f"because {cause}. Card and metrics have the figures of the saved adapter.",
        loaded,
    )


def _restored(network: nn.Module, pairs: PairSource) -> tuple[Tensor, float]:
    """The first image as the network restores it, and its PSNR in dB."""
    ((_, restored, target),) = restore_some(network, pairs, count=1)
    return restored, psnr(restored[None], target[None]).item()


def moved_buffers(trained: nn.Module, fresh: nn.Module) -> list[str]:
    """Names of the buffers that are not equal in two copies of a network."""
    others = dict(fresh.named_buffers())
    return [
        name.replace(".base_layer.", ".")
        for name, buffer in trained.named_buffers()
        if name in others and not torch.equal(buffer.cpu(), others[name].cpu())
    ]
