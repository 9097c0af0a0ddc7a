"""The training loss: mean absolute error and, on demand, the checkerboard that a network leaves on its images."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from colora_peft.inference import tile_multiple

from .arguments import TrainArguments


def loss_of_run(model: nn.Module, args: TrainArguments) -> TrainingLoss:
    """The loss that a run trains with.

    Raises:
        ValueError: A checkerboard is weighed that the network or its patches cannot have.
    """
    period = tile_multiple(model)
    if args.checkerboard_weight and period == 1:
        raise ValueError(
            f"--checkerboard_weight has no effect with {type(model).__name__}, which names no multiple that the sides "
            "of its images must have; leave it out."
        )
    if args.checkerboard_weight and args.resolution < 2 * period:
        raise ValueError(
            f"--checkerboard_weight has no effect with patches of --resolution {args.resolution}, because the network "
            f"repeats itself every {period} pixels; take {2 * period} or more."
        )
    return TrainingLoss(args.checkerboard_weight, period)


def checkerboard(image: Tensor, period: int) -> Tensor:
    """The pattern that repeats every `period` pixels in images, without its mean.

    Networks that work at lower resolutions, such as NAFNet, enlarge their features by a fixed rule (PixelShuffle). So
    pixels with different places in a cell of `period` x `period` come from different weights. Where these disagree,
    the same pattern lies in every cell (Odena et al., Deconvolution and Checkerboard Artifacts, Distill 2016). It is
    the mean over cells and images of each place in a cell. This measure is ours.

    Args:
        image: (B, C, H, W). Rows and columns that are left over by whole cells are left out.
        period: Side of a cell in pixels, such as `colora_peft.inference.tile_multiple` of the network.

    Returns:
        (C, period, period) in the unit of `image`; zeros where a side has fewer than two cells.

    Raises:
        ValueError: The images have other dimensions.
    """
    if image.ndim != 4:
        raise ValueError(f"A checkerboard is measured on images (B, C, H, W), not of shape {tuple(image.shape)}.")
    rows, columns = (side // period for side in image.shape[-2:])
    if min(rows, columns) < 2:
        return image.new_zeros(image.shape[1], period, period)
    cells = image[..., : rows * period, : columns * period]
    pattern = cells.unflatten(-1, (columns, period)).unflatten(-3, (rows, period)).mean((0, 2, 4))
    return pattern - pattern.mean((-2, -1), keepdim=True)


class TrainingLoss(NamedTuple):
    """Mean absolute error of a batch plus `checkerboard_weight` times that of the checkerboard of its errors.

    Where patches are cut at random, errors without a checkerboard have none on average. What is left of them falls
    with the number of cells in a batch: the term depends on the batch of a process and the size of its patches.
    """

    checkerboard_weight: float
    period: int

    def __call__(self, restored: Tensor, target: Tensor) -> Tensor:
        loss = F.l1_loss(restored, target)
        if self.checkerboard_weight:
            pattern = checkerboard(restored.float() - target, self.period)
            loss = loss + self.checkerboard_weight * pattern.abs().mean()
        return loss
