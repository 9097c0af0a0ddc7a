"""Reflection beyond the edges of an image, however far."""

import pytest
import torch
import torch.nn.functional as F
from support.padding import check_reflection

from colora_peft.inference.padding import pad_to_multiple, reflected_indices


@pytest.mark.parametrize("size", [(8, 8), (7, 6), (1, 5), (9, 16)])
@pytest.mark.parametrize("multiple", [1, 2, 8])
def test_padding_keeps_the_image_and_adds_what_is_in_it(size, multiple):
    x = torch.rand(2, 3, *size)
    padded = pad_to_multiple(x, multiple)
    height, width = padded.shape[-2:]
    assert height % multiple == width % multiple == 0
    assert size[0] <= height < size[0] + multiple and size[1] <= width < size[1] + multiple
    assert torch.equal(padded[..., : size[0], : size[1]], x)
    assert set(padded.flatten().tolist()) == set(x.flatten().tolist())


@pytest.mark.parametrize(("height", "width"), [(1, 2), (5, 16), (20, 9)])
def test_padding_is_by_reflection(height, width):
    check_reflection(pad_to_multiple, height, width)


def test_reflection_is_torchs_as_far_as_that_reaches_and_goes_on():
    line = torch.rand(1, 1, 7)
    assert torch.equal(line[..., reflected_indices(0, 13, 7)], F.pad(line, (0, 6), mode="reflect"))
    assert reflected_indices(0, 10, 3).tolist() == [0, 1, 2, 1, 0, 1, 2, 1, 0, 1]
    assert reflected_indices(2, 5, 1).tolist() == [0, 0, 0]
