"""colora_peft/inference/self_ensemble.py."""

import torch

from colora_peft.inference.self_ensemble import EIGHT


def test_they_are_the_eight_and_each_can_be_undone():
    x = torch.arange(12.0).view(1, 1, 3, 4)
    results = [transform.apply(x) for transform in EIGHT]
    assert len({(each.shape, tuple(each.flatten().tolist())) for each in results}) == 8
    assert torch.equal(results[0], x)
    assert all(torch.equal(transform.undo(each), x) for transform, each in zip(EIGHT, results, strict=True))


def test_a_rectangle_moves_with_the_image():
    x = torch.arange(20.0).view(1, 1, 4, 5)
    part = x[..., 1:3, 0:4]
    for transform in EIGHT:
        moved = transform.apply(x)
        (top, bottom), (left, right) = transform.apply_to_rectangle(((1, 3), (0, 4)), tuple(moved.shape[-2:]))
        assert torch.equal(moved[..., top:bottom, left:right], transform.apply(part))
