"""Positions of the tiles of an image, the weights that blend them, and the part that each one answers for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DISCARDED_SHARE = 0.25
"""Share of an overlap without weight: the outermost pixels of a tile, which its cut edge has spoilt (our choice)."""


@dataclass(frozen=True)
class TileAxis:
    """Tiles along one axis, all of one length; positions in pixels of the padded image."""

    size: int
    """Pixels of the image, without padding."""
    length: int
    """Pixels of each tile."""
    starts: tuple[int, ...]
    """First pixel of each tile, ascending, the first 0."""
    weights: Tensor
    """(tiles, length) float32: a partition of unity, at every pixel the weights of its tiles sum to 1."""
    cores: tuple[tuple[int, int], ...]
    """[first, end) of each tile's own part, relative to its start; together the parts are the axis."""


def lay_tiles(size: int, tile: int | None, overlap: int, multiple: int) -> TileAxis:
    """Spreads tiles evenly over `size` pixels, padded up to a multiple of `multiple`.

    All tiles begin and end at a multiple of `multiple`, as the levels of the network do. One tile, of the padded
    size, if `tile` is None or as long; otherwise as many as `overlap` demands, which is a lower bound.

    Raises:
        ValueError: As `check_tile`.
    """
    padded = math.ceil(size / multiple) * multiple
    if tile is None or tile >= padded:
        return TileAxis(size, padded, (0,), torch.ones(1, padded), ((0, padded),))
    check_tile(tile, overlap, multiple)
    length = tile // multiple * multiple
    stride = (tile - overlap) // multiple * multiple
    count = math.ceil((padded - length) / stride) + 1
    # In steps of `multiple`, rounded down: neighbours are then never further apart than `stride`.
    steps = (padded - length) // multiple
    starts = tuple(index * steps // (count - 1) * multiple for index in range(count))
    return TileAxis(size, length, starts, _weights(starts, length), _cores(starts, length, multiple))


def check_tile(tile: int, overlap: int, multiple: int) -> None:
    """Checks that tiles of `tile` pixels that overlap by `overlap` can be laid in steps of `multiple`.

    Raises:
        ValueError: A number is too small, or `overlap` leaves no step.
    """
    if tile < multiple:
        raise ValueError(
            f"A tile of {tile} pixels is smaller than the network's size multiple of {multiple}; make it at least "
            "that."
        )
    if overlap < 0:
        raise ValueError(f"The overlap must not be negative, got {overlap}.")
    length = tile // multiple * multiple
    if length - overlap < multiple:
        raise ValueError(
            f"An overlap of {overlap} pixels leaves tiles of {length} no step of {multiple}, the network's size "
            f"multiple; take an overlap of at most {length - multiple}, or larger tiles."
        )


def _weights(starts: tuple[int, ...], length: int) -> Tensor:
    """Returns (tiles, length): a squared-cosine ramp over each overlap, without its discarded share, normalised."""
    ramps = torch.ones(len(starts), length, dtype=torch.float64)
    for left in range(len(starts) - 1):
        overlap = starts[left] + length - starts[left + 1]
        rising = _ramp(overlap)
        ramps[left + 1, :overlap] *= rising
        ramps[left, length - overlap :] *= rising.flip(0)
    total = torch.zeros(starts[-1] + length, dtype=torch.float64)
    for start, ramp in zip(starts, ramps, strict=True):
        total[start : start + length] += ramp
    shares = [ramp / total[start : start + length] for start, ramp in zip(starts, ramps, strict=True)]
    return torch.stack(shares).float()


def _ramp(overlap: int) -> Tensor:
    """Returns (overlap,) values from 0 to 1, which sum to 1 with their mirror image."""
    position = (torch.arange(overlap, dtype=torch.float64) + 0.5) / max(overlap, 1)
    inner = ((position - DISCARDED_SHARE) / (1 - 2 * DISCARDED_SHARE)).clamp(0, 1)
    return torch.sin(math.pi / 2 * inner).square()


def _cores(starts: tuple[int, ...], length: int, multiple: int) -> tuple[tuple[int, int], ...]:
    """Cuts each overlap in its middle, at a multiple of `multiple`: every level of the network is cut alike."""
    cuts = [0]
    for left, right in zip(starts, starts[1:], strict=False):
        cuts.append((left + length + right) // 2 // multiple * multiple)
    cuts.append(starts[-1] + length)
    return tuple((cuts[i] - start, cuts[i + 1] - start) for i, start in enumerate(starts))
