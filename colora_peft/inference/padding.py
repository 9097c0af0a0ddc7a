"""Images continued beyond their edges by reflection, however far.

(Restormer, which imports nothing from here, reflects by itself.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["pad_to_multiple", "reflected_indices"]


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Images (B, C, H, W) continued below and to the right until H and W are multiples of `multiple`.

    They are mirrored about the last row and column, and back and forth where a side is too short for `F.pad`.
    """
    if multiple == 1:
        return images
    height, width = images.shape[-2:]
    below, right = -height % multiple, -width % multiple
    if min(height, width) >= multiple:  # this way only is in exported networks
        return F.pad(images, (0, right, 0, below), mode="reflect")
    rows, columns = reflected_indices(0, height + below, height), reflected_indices(0, width + right, width)
    return images[..., rows.to(images.device), :][..., columns.to(images.device)]


def reflected_indices(start: int, end: int, size: int) -> Tensor:
    """(end - start,) int64: pixels [start, end) of an axis of `size` that is reflected at its ends without end.

    As torch's "reflect" padding, which only reaches size - 1 pixels far; an axis of one pixel is repeated.
    """
    if size == 1:
        return torch.zeros(end - start, dtype=torch.int64)
    period = 2 * (size - 1)
    folded = torch.arange(start, end) % period
    return torch.where(folded < size, folded, period - folded)
