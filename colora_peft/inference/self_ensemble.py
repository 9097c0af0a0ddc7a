"""Flips and rotations of an image, over which a geometric self-ensemble averages.

Lim, Son, Kim, Nah, Lee, "Enhanced Deep Residual Networks for Single Image Super-Resolution", CVPR Workshops 2017,
arXiv 1707.02921, section 3.4.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from torch import Tensor

from .global_pooling import Rectangle


class Transform(NamedTuple):
    """Flip or rotation: rows and columns exchanged, then rows, then columns reversed."""

    transposed: bool
    rows_reversed: bool
    columns_reversed: bool

    def apply(self, tiles: Tensor) -> Tensor:
        """Turns (..., H, W) to (..., H, W) or (..., W, H)."""
        return self._reversed(tiles.transpose(-1, -2) if self.transposed else tiles)

    def undo(self, tiles: Tensor) -> Tensor:
        """Inverse of `apply`."""
        tiles = self._reversed(tiles)
        return tiles.transpose(-1, -2) if self.transposed else tiles

    def apply_to_rectangle(self, rectangle: Rectangle, shape: tuple[int, int]) -> Rectangle:
        """Returns the place of a part of a tile in the transformed tile, whose height and width are `shape`."""
        sides = rectangle[::-1] if self.transposed else rectangle
        rows, columns = (
            (size - end, size - first) if is_reversed else (first, end)
            for (first, end), size, is_reversed in zip(sides, shape, self[1:], strict=True)
        )
        return rows, columns

    def _reversed(self, tiles: Tensor) -> Tensor:
        dims = [dim for dim, is_reversed in ((-2, self.rows_reversed), (-1, self.columns_reversed)) if is_reversed]
        return tiles.flip(dims) if dims else tiles


EIGHT = tuple(Transform(*flags) for flags in itertools.product((False, True), repeat=3))
