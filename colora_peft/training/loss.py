"""The training loss: mean absolute error and the checkerboard that a network leaves on its images."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_FLOOR = (1 / 255) ** 2
"""Variance that every cell has at least: that of one grey level. Flat cells would count for all without it."""
_MIN_CELLS_A_SIDE = 4
"""The mean over fewer cells tells more of what the image shows than of a pattern."""


def centred_cells(images: Tensor, period: int) -> Tensor:
    """Cuts images (B, C, H, W) into cells of `period` x `period`, each without its mean: (B, C, cells, period²).

    Rows and columns that are left over by whole cells are left out.

    Raises:
        ValueError: The images have other dimensions.
    """
    if images.ndim != 4:
        raise ValueError(f"A checkerboard is measured on images (B, C, H, W), not of shape {tuple(images.shape)}.")
    rows, columns = (side // period for side in images.shape[-2:])
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    whole = images[..., : rows * period, : columns * period].unflatten(-1, (columns, period))
    cells = whole.unflatten(-3, (rows, period)).transpose(-3, -2).flatten(-4, -3).flatten(-2)
    return cells - cells.mean(-1, keepdim=True)


def checkerboard(images: Tensor, period: int) -> Tensor:
    """The pattern that repeats every `period` pixels in each image, without its mean.

    Networks that work at lower resolutions, such as NAFNet, enlarge their features by a fixed rule (PixelShuffle). So
    pixels with different places in a cell of `period` x `period` come from different weights. Where these disagree,
    the same pattern lies in every cell (Odena et al., Deconvolution and Checkerboard Artifacts, Distill 2016). It is
    the mean over the cells of an image of each place in a cell. All else in a cell is noise to it. So a cell weighs by
    the inverse of the variance around the plain mean, and smooth areas, where a pattern shows, weigh most. This
    measure is ours. No gradient goes through the weights.

    Args:
        images: (B, C, H, W). Rows and columns that are left over by whole cells are left out.
        period: Side of a cell in pixels, such as `colora_peft.inference.tile_multiple` of the network.

    Returns:
        (B, C, period, period) in the unit of `images`; zeros where a side has fewer than four cells.

    Raises:
        ValueError: The images have other dimensions.
    """
    cells = centred_cells(images, period)
    if min(images.shape[-2:]) < _MIN_CELLS_A_SIDE * period:
        return images.new_zeros(*images.shape[:2], period, period)
    with torch.no_grad():
        weights = 1 / ((cells - cells.mean(-2, keepdim=True)).square().mean(-1) + _FLOOR)
        weights /= weights.sum(-1, keepdim=True)
    return torch.einsum("bcn,bcnp->bcp", weights, cells).unflatten(-1, (period, period))


def checkerboard_obstacle(period: int, resolution: int) -> str | None:
    """Returns why the loss on checkerboards is zero at a period and a side of patches in pixels; None if it acts."""
    if period <= 1:
        return "the network names no multiple of its sides (needs_multiple_of or pads_to_multiple)"
    if resolution < _MIN_CELLS_A_SIDE * period:
        return (
            f"patches of {resolution} pixels hold fewer than {_MIN_CELLS_A_SIDE} periods of {period} a side; "
            f"--resolution {_MIN_CELLS_A_SIDE * period} does"
        )
    return None


class TrainingLoss(NamedTuple):
    """Mean absolute error of a batch plus `checkerboard_weight` times that of the checkerboards of its errors.

    It is the mean of the losses of its images. Where patches are cut at random, errors without a checkerboard have
    none on average. What is left of them in one patch is less, the more smooth cells it has.
    """

    checkerboard_weight: float
    period: int

    def __call__(self, restored: Tensor, target: Tensor) -> Tensor:
        loss = F.l1_loss(restored, target)
        if self.checkerboard_weight and self.period > 1:
            errors = (restored - target).contiguous()  # its cells are cut faster than with the channels last
            loss = loss + self.checkerboard_weight * checkerboard(errors, self.period).abs().mean()
        return loss
