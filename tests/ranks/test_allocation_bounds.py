"""Laws of rank allocation with a minimum and a maximum for some layers, over random networks."""

import math
import random
import re
from fractions import Fraction

import pytest
from support.allocation import next_level, random_network, spent, total

from colora_peft.ranks import MatrixShape, adapter_parameters, allocate_ranks

SEEDS = range(60)


def random_bounds(seed, shapes):
    """(min_ranks, max_ranks) that can be met, of about half of the layers each."""
    draw = random.Random(1000 + seed)
    min_ranks, max_ranks = {}, {}
    for name, (d, k) in shapes.items():
        levels = [0, *sorted({MatrixShape(d, k).stored_rank(rank) for rank in range(1, min(d, k) + 1)})]
        low, high = sorted(draw.choices(range(len(levels)), k=2))
        low = min(low, 2)  # or the budget would go to minima alone
        if draw.random() < 0.4:
            min_ranks[name] = levels[low]
        if draw.random() < 0.6:
            max_ranks[name] = draw.randint(levels[high], 2 * min(d, k))
    return min_ranks, max_ranks


def allocate(seed, budget, bounded, beta=0.5, delta_min=0.0):
    """(shapes, scores, min_ranks, max_ranks, ranks); ranks None where the budget does not pay for the minima."""
    shapes, scores = random_network(seed)
    min_ranks, max_ranks = random_bounds(seed, shapes) if bounded else ({}, {})
    try:
        ranks = allocate_ranks(shapes, scores, budget, beta, delta_min, min_ranks, max_ranks)
    except ValueError as error:
        assert any(
            text in str(error)
            for text in ("parameter_budget to at least", "All contributions are 0", "leave no layer a rank")
        )
        ranks = None
    return shapes, scores, min_ranks, max_ranks, ranks


def can_grow(name, rank, shapes, max_ranks):
    """The layer's next level, or None where it is dense or at its maximum."""
    level = next_level(rank, *shapes[name])
    return None if level is None or level > max_ranks.get(name, level) else level


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize(("beta", "delta_min"), [(0, 0.0), (0.5, 0.0), (1, 0.1), (2.5, 0.0)])
def test_bounds_and_budget_are_kept_and_the_next_step_would_not_fit(seed, bounded, beta, delta_min):
    allocated = 0
    for budget in (0.2, 0.5, 0.8, 1.0):
        shapes, scores, min_ranks, max_ranks, ranks = allocate(seed, budget, bounded, beta, delta_min)
        if ranks is None:
            continue
        allocated += 1
        assert list(ranks) == list(shapes)
        assert all(ranks[name] >= rank for name, rank in min_ranks.items())
        assert all(ranks[name] <= rank for name, rank in max_ranks.items())
        assert spent(shapes, ranks) <= Fraction(str(budget)) * total(shapes)
        growing = {
            name: can_grow(name, rank, shapes, max_ranks)
            for name, rank in ranks.items()
            if beta == 0 or scores[name] > 0
        }
        costs = [spent(shapes, {**ranks, name: level}) for name, level in growing.items() if level is not None]
        assert not costs or max(costs) > budget * total(shapes)
    assert allocated or not any(max_ranks.get(name, 1) for name in shapes if scores[name] > 0)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("bounded", [False, True])
def test_more_budget_never_lowers_a_rank(seed, bounded):
    before = None
    for percent in range(1, 101, 3):
        shapes, scores, _, _, ranks = allocate(seed, percent / 100, bounded)
        assert before is None or (ranks is not None and all(ranks[name] >= before[name] for name in shapes))
        before = ranks
    if not bounded:  # 100 percent
        assert all(MatrixShape(*shapes[name]).is_dense(before[name]) or scores[name] == 0 for name in shapes)


@pytest.mark.parametrize("seed", SEEDS)
def test_higher_score_never_gets_less_at_equal_shape_and_bounds(seed):
    draw = random.Random(seed)
    shapes = {f"layer{i}": (24, 72) for i in range(12)}
    scores = {name: draw.choice([0.0, 1.0, math.nextafter(1, 2), draw.random(), 1e-12]) for name in shapes}
    scores["layer3"] = 2.0
    bounds = {name: draw.choice([(0, 24), (1, 3), (2, 24)]) for name in shapes}
    min_ranks, max_ranks = ({name: bound[side] for name, bound in bounds.items()} for side in (0, 1))
    for budget in (0.12, 0.2, 0.5, 0.9):
        beta = draw.choice([0.25, 0.5, 1])
        ranks = allocate_ranks(shapes, scores, budget, beta, min_ranks=min_ranks, max_ranks=max_ranks)
        for bound in set(bounds.values()):
            alike = sorted((name for name in shapes if bounds[name] == bound), key=lambda name: scores[name])
            for lower, higher in zip(alike, alike[1:], strict=False):
                assert ranks[lower] <= ranks[higher] or scores[lower] == scores[higher]


@pytest.mark.parametrize("seed", SEEDS)
def test_what_a_maximum_frees_goes_to_the_others(seed):
    shapes, scores = random_network(seed)
    free = allocate_ranks(shapes, scores, 0.7)
    capped = max(free, key=lambda name: adapter_parameters(free[name], *shapes[name]))
    if len(shapes) == 1:
        return
    most = {capped: free[capped] // 2}
    try:
        ranks = allocate_ranks(shapes, scores, 0.7, max_ranks=most)
    except ValueError as error:
        assert "All contributions" in str(error) or "at least" in str(error)
        return
    assert ranks[capped] <= most[capped]
    assert all(ranks[name] >= free[name] for name in shapes if name != capped)
    growing = [name for name in shapes if name != capped and scores[name] > 0]
    steps = {name: next_level(free[name], *shapes[name]) for name in growing}
    left = Fraction("0.7") * total(shapes) - spent(shapes, {**free, capped: ranks[capped]})
    fits_all = all(
        level is not None and spent({name: shapes[name]}, {name: level}) <= left for name, level in steps.items()
    )
    assert not (growing and fits_all) or any(ranks[name] > free[name] for name in growing)


@pytest.mark.parametrize("seed", SEEDS)
def test_bounds_that_bind_nothing_change_nothing(seed):
    shapes, scores = random_network(seed)
    least, most = dict.fromkeys(shapes, 0), {name: min(shape) for name, shape in shapes.items()}
    assert allocate_ranks(shapes, scores, 0.8, min_ranks=least, max_ranks=most) == allocate_ranks(shapes, scores, 0.8)


def test_a_maximum_below_dense_stops_the_climb():
    shapes = {"a": (8, 8), "b": (8, 8)}  # rank 3 costs 48 of 64, from rank 4 on the delta is dense
    scores = {"a": 1.0, "b": 1e-9}
    assert allocate_ranks(shapes, scores, 1.0, max_ranks={"a": 7}) == {"a": 3, "b": 8}
    assert allocate_ranks(shapes, scores, 1.0, max_ranks={"a": 8}) == {"a": 8, "b": 8}
    assert allocate_ranks(shapes, scores, 0.5, max_ranks={"a": 0}) == {"a": 0, "b": 8}
    assert allocate_ranks(shapes, scores, 0.9, delta_min=0.5, max_ranks={"a": 1}) == {"a": 1, "b": 8}


def test_a_minimum_is_granted_whatever_the_score():
    shapes = {"a": (8, 8), "b": (8, 8)}
    scores = {"a": 1.0, "b": 0.0}
    assert allocate_ranks(shapes, scores, 0.5, min_ranks={"b": 2}) == {"a": 2, "b": 2}
    # No factors of rank 4 are worth it, and there is no rank 99.
    assert allocate_ranks(shapes, scores, 0.9, min_ranks={"b": 4}) == {"a": 3, "b": 8}
    assert allocate_ranks(shapes, scores, 0.9, min_ranks={"b": 99}) == {"a": 3, "b": 8}
    assert allocate_ranks(shapes, {"a": 0.0, "b": 0.0}, 0.9, min_ranks={"b": 2}) == {"a": 0, "b": 2}


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"min_ranks": {"conv": 3}, "max_ranks": {"conv": 2}}, "'conv' of shape 8 x 8 .* least rank 3 .* most rank 2"),
        ({"min_ranks": {"conv": 4}, "max_ranks": {"conv": 5}}, r"which no rank meets \(from rank 4 on it is dense"),
        ({"min_ranks": {"con": 3}}, "'con' in `min_ranks`.*did you mean 'conv'"),
        ({"max_ranks": {"con": 3}}, "'con' in `max_ranks`.*did you mean 'conv'"),
        ({"max_ranks": {"conv": 0, "body": 0}}, "maximum ranks leave no layer a rank: raise one"),
        (
            {"min_ranks": {"conv": 3, "body": 3}},
            r"minima \(.*\) alone take 96 .* allows 64 of 128: .* parameter_budget to at least 0.75\.$",
        ),
    ],
)
def test_bounds_that_cannot_be_met_are_named(bounds, message):
    with pytest.raises(ValueError, match=message):
        allocate_ranks({"conv": (8, 8), "body": (8, 8)}, {"conv": 1.0, "body": 0.5}, 0.5, **bounds)


@pytest.mark.parametrize(
    ("shapes", "scores", "max_ranks", "message"),
    [
        (
            {"a": (8, 8), "b": (8, 8)},
            {"a": 1.0, "b": 0.0},
            {"a": 0},
            r"^The maximum ranks leave no layer with a contribution above 0 a rank: raise one, .* 'a' to 1\.$",
        ),
        # Factors of rank 1 cost as much as the 2 x 2 weight, so that its only level is dense.
        ({"a": (2, 2)}, None, {"a": 1}, r"^The maximum ranks leave no layer a rank: .* 'a' to 2\.$"),
        ({"a": (8, 8), "b": (8, 8)}, {"a": 0.0, "b": 1.0}, {"a": 0, "b": 0}, "leave no layer a rank: .* 'b' to 1"),
        ({"a": (8, 8), "b": (8, 8)}, {"a": 0.0, "b": 0.0}, {"a": 0}, "All contributions are 0"),
    ],
)
def test_maxima_that_leave_nothing_to_give_say_which_to_raise(shapes, scores, max_ranks, message):
    with pytest.raises(ValueError, match=message) as caught:
        allocate_ranks(shapes, scores, 1.0, max_ranks=max_ranks)
    remedy = re.search(r"'(\w+)' to (\d+)", str(caught.value))
    if remedy:
        name, rank = remedy.groups()
        assert any(allocate_ranks(shapes, scores, 1.0, max_ranks={**max_ranks, name: int(rank)}).values())
