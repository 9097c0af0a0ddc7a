"""colora_peft/inference/tile_grid.py: laws of the tiles over many sizes."""

import pytest
import torch

from colora_peft.inference.tile_grid import lay_tiles

GRIDS = [
    (size, tile, overlap, multiple)
    for size in (1, 15, 16, 17, 64, 65, 100, 333, 1000)
    for tile, overlap, multiple in ((16, 0, 1), (17, 5, 1), (64, 16, 16), (64, 48, 16), (70, 20, 16), (48, 31, 8))
]


@pytest.mark.parametrize(("size", "tile", "overlap", "multiple"), GRIDS)
def test_laws_of_tiles(size, tile, overlap, multiple):
    axis = lay_tiles(size, tile, overlap, multiple)
    padded = -(-size // multiple) * multiple
    # From end to end, on the network's grid, overlapping at least as asked.
    assert axis.starts[0] == 0 and axis.starts[-1] + axis.length == padded and axis.length <= tile
    assert not any(value % multiple for value in (*axis.starts, axis.length))
    for left, right in zip(axis.starts, axis.starts[1:], strict=False):
        assert left < right <= left + tile - overlap
    # The weights are a partition of unity, the cores one of the pixels.
    weights, owners = torch.zeros(padded), torch.zeros(padded)
    for start, share, (first, end) in zip(axis.starts, axis.weights, axis.cores, strict=True):
        assert share.min() >= 0 and 0 <= first < end <= axis.length
        weights[start : start + axis.length] += share
        owners[start + first : start + end] += 1
    torch.testing.assert_close(weights, torch.ones(padded), rtol=0, atol=1e-6)
    assert torch.equal(owners, torch.ones(padded))


def test_weights_are_smooth_and_leave_out_what_a_cut_edge_has_spoilt():
    axis = lay_tiles(1000, 256, 64, 1)
    inner = axis.weights[1]
    overlap = axis.starts[0] + axis.length - axis.starts[1]
    assert torch.all(inner[: overlap // 4] == 0) and torch.all(inner[overlap : axis.length - overlap] == 1)
    assert inner.diff().abs().max() < 4 / overlap  # the steepest step of a squared cosine over half the overlap


@pytest.mark.parametrize("tile", [None, 64, 100])
def test_an_image_no_larger_than_the_tile_is_one_tile(tile):
    axis = lay_tiles(50, tile, 16, 16)
    assert (axis.starts, axis.length, axis.cores) == ((0,), 64, ((0, 64),))
    assert torch.equal(axis.weights, torch.ones(1, 64))


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [(8, 0, "tile of 8 .* multiple of 16"), (64, 64, "at most 48"), (70, 50, "at most 48"), (64, -1, "negative")],
)
def test_impossible_tiles_are_refused(tile, overlap, message):
    with pytest.raises(ValueError, match=message):
        lay_tiles(1000, tile, overlap, 16)
