"""Helpers shared by tests: those of ranks/test_allocation.py."""

import random

from colora_peft.ranks import MatrixShape, adapter_parameters


def random_network(seed):
    """(shapes, scores) of 1 to 12 layers whose scores span ten orders of magnitude, some of them 0."""
    draw = random.Random(seed)
    shapes = {f"layer{i}": (draw.randint(1, 40), draw.randint(1, 120)) for i in range(draw.randint(1, 12))}
    scores = {name: 10 ** draw.uniform(-9, 1) * (draw.random() > 0.1) for name in shapes}
    scores["layer0"] = scores["layer0"] or 1.0
    return shapes, scores


def total(shapes):
    return sum(d * k for d, k in shapes.values())


def spent(shapes, ranks):
    return sum(adapter_parameters(rank, *shapes[name]) for name, rank in ranks.items())


def next_level(rank, d, k):
    """The level after `rank` as written into a config, or None after dense."""
    shape = MatrixShape(d, k)
    return None if shape.is_dense(rank) else shape.stored_rank(rank + 1)
