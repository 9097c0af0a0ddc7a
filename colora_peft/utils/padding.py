"""Reflection beyond the edges of images, however far. Networks and the code that runs them share it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Returns images (B, C, H, W) reflected below and to the right until H and W are multiples of `multiple`."""
    if multiple == 1:
        return images
    height, width = images.shape[-2:]
    below, right = -height % multiple, -width % multiple
    if min(height, width) >= multiple:  # an exported network holds this way alone
        return F.pad(images, (0, right, 0, below), mode="reflect")
    rows, columns = reflected_indices(0, height + below, height), reflected_indices(0, width + right, width)
    return images[..., rows.to(images.device), :][..., columns.to(images.device)]


def reflected_indices(start: int, end: int, size: int) -> Tensor:
    """Returns the pixels [start, end), (end - start,) int64, of an axis of `size` that is reflected without end.

    This is torch's "reflect" padding, which by itself reaches only size - 1 pixels. An axis of one pixel is repeated.
    """
    if size == 1:
        return torch.zeros(end - start, dtype=torch.int64)
    period = 2 * (size - 1)
    folded = torch.arange(start, end) % period
    return torch.where(folded < size, folded, period - folded)
