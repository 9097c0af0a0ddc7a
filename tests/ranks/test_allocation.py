"""Laws of rank allocation, over random networks."""

import math

import pytest
from support.allocation import random_network, spent, total

from colora_peft.ranks import MatrixShape, adapter_parameters, allocate_ranks, check_pays_for_a_rank

SEEDS = range(40)


def solved_by_definition(shapes, scores, alpha, beta, delta_min):
    """Ranks straight from delta_i = clip(alpha * C_i ** beta, delta_min, 1)."""
    ranks = {}
    for name, (d, k) in shapes.items():
        weight = 1.0 if beta == 0 or scores is None else scores[name] ** beta
        share = min(max(alpha * weight, delta_min), 1.0)
        shape = MatrixShape(d, k)
        levels = [shape.stored_rank(rank) for rank in range(1, min(d, k) + 1)]
        fitting = [rank for rank in levels if shape.parameters(rank) <= share * d * k * (1 + 1e-12)]
        ranks[name] = max(fitting, default=0)
    return ranks


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("beta", "delta_min"), [(0, 0.0), (0.5, 0.0), (0.5, 0.2), (1, 0.05)])
def test_ranks_solve_the_formula(seed, beta, delta_min):
    """Some alpha gives these ranks: bisection lands on the same spending, or ties keep it one step below."""
    shapes, scores = random_network(seed)
    ranks = allocate_ranks(shapes, scores, 0.9, beta, delta_min)
    low, high = -200.0, 200.0  # log2 of alpha
    for _ in range(200):
        middle = (low + high) / 2
        fits = spent(shapes, solved_by_definition(shapes, scores, 2.0**middle, beta, delta_min)) <= 0.9 * total(shapes)
        low, high = (middle, high) if fits else (low, middle)
    below = solved_by_definition(shapes, scores, 2.0**low, beta, delta_min)
    above = solved_by_definition(shapes, scores, 2.0**high, beta, delta_min)
    assert all(below[name] <= ranks[name] <= above[name] for name in shapes)


@pytest.mark.parametrize("seed", SEEDS)
def test_unit_of_the_scores_does_not_matter(seed):
    shapes, scores = random_network(seed)
    expected = allocate_ranks(shapes, scores, 0.8)
    for factor in (2.0**-30, 1e-3, 7.0, 1e6):
        assert allocate_ranks(shapes, {name: factor * score for name, score in scores.items()}, 0.8) == expected


def test_without_scores_and_with_beta_zero_the_share_is_uniform():
    shapes = {"a": (64, 64), "b": (32, 288), "c": (128, 128)}
    uniform = allocate_ranks(shapes, None, 0.3)
    assert uniform == allocate_ranks(shapes, {"a": 1.0, "b": 0.0, "c": 5.0}, 0.3, beta=0)
    shares = {
        name: adapter_parameters(rank, *shapes[name]) / math.prod(shapes[name]) for name, rank in uniform.items()
    }
    one_rank = max(sum(shape) / math.prod(shape) for shape in shapes.values())
    assert max(shares.values()) - min(shares.values()) <= one_rank


def test_score_zero_gets_rank_zero_unless_delta_min_grants_one():
    shapes, scores = {"a": (64, 64), "b": (64, 64)}, {"a": 1.0, "b": 0.0}
    assert allocate_ranks(shapes, scores, 0.9)["b"] == 0
    assert allocate_ranks(shapes, scores, 0.9, delta_min=0.1)["b"] == 3  # 3 * 128 of 4096 is 9.4 %


def test_scores_many_orders_apart_neither_overflow_nor_vanish():
    shapes = {"a": (8, 8), "b": (8, 8)}
    ranks = allocate_ranks(shapes, {"a": 1e300, "b": 1e-300}, 0.9, beta=4)
    assert ranks == {"a": 8, "b": 3}


def test_budget_one_makes_every_layer_dense_and_is_spent_exactly():
    shapes = {"a": (8, 8), "b": (3, 27), "c": (1, 50)}
    ranks = allocate_ranks(shapes, None, 1.0)
    assert ranks == {"a": 8, "b": 3, "c": 1}
    assert spent(shapes, ranks) == total(shapes)


def test_decimal_budget_is_taken_as_typed():
    assert allocate_ranks({"a": (1, 29), "b": (1, 71)}, {"a": 1.0, "b": 0.0}, 0.29) == {"a": 1, "b": 0}


@pytest.mark.parametrize("seed", SEEDS)
def test_smallest_budget_named_in_the_error_works(seed):
    shapes, scores = random_network(seed)
    with pytest.raises(ValueError, match="at least") as caught:
        allocate_ranks(shapes, scores, 1e-7)
    smallest = float(str(caught.value).rstrip(".").rpartition(" ")[2])
    assert any(allocate_ranks(shapes, scores, smallest).values())


@pytest.mark.parametrize("seed", SEEDS)
def test_no_scores_make_a_budget_enough_that_pays_for_no_rank(seed):
    shapes, scores = random_network(seed)
    with pytest.raises(ValueError, match="at least") as caught:
        check_pays_for_a_rank(shapes.values(), 1e-7)
    smallest = float(str(caught.value).rstrip(".").rpartition(" ")[2])
    check_pays_for_a_rank(shapes.values(), smallest)
    cheapest = min(shapes, key=lambda name: adapter_parameters(1, *shapes[name]))
    alone = {name: float(name == cheapest) for name in scores}
    assert allocate_ranks(shapes, alone, smallest)[cheapest] >= 1
    with pytest.raises(ValueError, match="no layer that CoLoRA adapts"):
        check_pays_for_a_rank([], 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({}, None, 0.1), "no layer"),
        (({"conv": (8, 8)}, {"conv": 1.0, "con": 2.0}, 0.5), "'con'.*did you mean 'conv'"),
        (({"conv": (8, 8), "body": (8, 8)}, {"conv": 1.0}, 0.5), "'body'.*missing"),
        (({"conv": (8, 8)}, {"conv": -1.0}, 0.5), "'conv' is -1"),
        (({"conv": (8, 8)}, {"conv": math.nan}, 0.5), "'conv' is nan"),
        (({"conv": (8, 8)}, {"conv": 0.0}, 0.5), "All contributions are 0"),
        (({"conv": (8, 8)}, None, 0.3, 0.5, 0.5), "alone take 32 .* allows 19 of 64"),
    ],
)
def test_bad_input_is_one_clear_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        allocate_ranks(*arguments)
