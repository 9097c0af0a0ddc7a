"""Helpers shared by tests: those of inference/test_padding.py."""

import math

import torch
import torch.nn.functional as F


def check_reflection(pad, height, width):
    """Checks that `pad(images, 8)` mirrors, and goes back and forth where the image ends."""
    x = torch.rand(1, 2, height, width)
    padded, expected = pad(x, 8), x
    for dim, size in ((2, height), (3, width)):
        mirrored = [*range(size), *range(size - 2, 0, -1)] * 8
        expected = expected.index_select(dim, torch.tensor(mirrored[: math.ceil(size / 8) * 8]))
    assert torch.equal(padded, expected)
    if height > 4 and width > 4:
        assert torch.equal(padded, F.pad(x, (0, -width % 8, 0, -height % 8), mode="reflect"))
