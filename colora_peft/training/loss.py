"""The training loss: mean absolute error and, on demand, the checkerboard that a network leaves on its images."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


def checkerboard(image: Tensor, period: int) -> Tensor:
    """The pattern that repeats every `period` pixels in images, without its mean.

    Networks that work at lower resolutions, such as NAFNet, enlarge their features by a fixed rule (PixelShuffle), so
    that pixels with different places in a cell of `period` x `period` come from different weights. What these do not
    agree on is a pattern over the whole image (Odena et al., Deconvolution and Checkerboard Artifacts, Distill 2016).
    It is the mean over cells and images of each place in a cell. That it is measured in this way is ours.

    Args:
        image: (B, C, H, W). Rows and columns that are left over by whole cells are left out.
        period: Side of a cell in pixels, such as `colora_peft.inference.tile_multiple` of the network.

    Returns:
        (C, period, period) in the unit of `image`; zeros where a side has fewer than two cells.
    """
    rows, columns = (side // period for side in image.shape[-2:])
    if min(rows, columns) < 2:
        return image.new_zeros(image.shape[1], period, period)
    cells = image[..., : rows * period, : columns * period]
    pattern = cells.unflatten(-1, (columns, period)).unflatten(-3, (rows, period)).mean((0, 2, 4))
    return pattern - pattern.mean((-2, -1), keepdim=True)


class TrainingLoss(NamedTuple):
    """Mean absolute error of a batch plus `checkerboard_weight` times that of the checkerboard of its errors.

    Where patches are cut at random, errors without a checkerboard have none on average. Networks that take images of
    any size have a period of 1, and none.
    """

    checkerboard_weight: float
    period: int

    def __call__(self, restored: Tensor, target: Tensor) -> Tensor:
        loss = F.l1_loss(restored, target)
        if self.checkerboard_weight:
            pattern = checkerboard(restored.float() - target, self.period)
            loss = loss + self.checkerboard_weight * pattern.abs().mean()
        return loss
