"""What a restoration network returns, and the loss of it that training and the contribution scores share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["reconstruct", "restoration_loss"]


def reconstruct(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """The restored pictures (B, C, H, W) of any network that returns them as a tensor or under `reconstruction`.

    Raises:
        TypeError: if the network returns something else.
        ValueError: if the restored pictures are not of the shape of the input.
    """
    output = model(pixel_values)
    reconstruction = output if isinstance(output, Tensor) else getattr(output, "reconstruction", None)
    if not isinstance(reconstruction, Tensor):
        raise TypeError(
            f"{type(model).__name__} returned {type(output).__name__}; a restoration network must return the restored "
            "pictures as a tensor or as an output with the field `reconstruction`."
        )
    if reconstruction.shape != pixel_values.shape:
        raise ValueError(
            f"{type(model).__name__} returned pictures of shape {tuple(reconstruction.shape)} for inputs of shape "
            f"{tuple(pixel_values.shape)}; a restoration network must keep the shape."
        )
    return reconstruction


def restoration_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean absolute error between the restored `pixel_values` and `labels`: the loss of training and of the scores."""
    return F.l1_loss(reconstruct(model, batch["pixel_values"]), batch["labels"])
