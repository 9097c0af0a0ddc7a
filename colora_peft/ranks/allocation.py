"""Allocation of ranks to layers under a budget of trained parameters: a pure function of shapes and scores.

A layer i of shape (d, k) with contribution C_i is to train the share

    delta_i = clip(alpha * C_i ** beta, delta_min, 1)

of its d * k weights. alpha is as large as `parameter_budget` of all targeted weights allows. The paper (arXiv
2408.01099) lets ranks, and a ratio of learnable parameters of each layer, follow contribution. Its formula is not in
our sources. The power law, `beta` and `delta_min` are our choice: one exponent goes from the same share everywhere
(beta = 0) to shares proportional to contribution (beta = 1). Whole ranks set a limit: in a thin layer (depthwise,
first or last) one rank may be more than the common share, and then the layer gets rank 0.

Ranks are whole, so a layer climbs levels: rank 1, 2, ..., the last rank whose factors cost less than the weight
itself, then dense (written as rank min(d, k)). It reaches a level of share s when alpha = s / C_i ** beta. Sorting the
steps of all layers by that alpha and taking the longest prefix that fits solves for alpha exactly. It also makes a
larger budget a superset of a smaller one. A layer's minimum rank grants it the first levels whatever alpha is. Its
maximum takes the last ones away, and their cost goes to the other layers.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import NamedTuple

from .matrix_shape import MatrixShape
from .names import check_known_names, check_same_names
from .scores import check_scores


class RankStep(NamedTuple):
    """One layer's step to its next level; the order of the fields is the order in which steps are granted."""

    log_alpha: float
    """Natural logarithm of the alpha at which the level is reached; -inf for what minima guarantee."""
    minus_score: float
    """Where two alphas round to the same number the higher score goes first."""
    layer_index: int
    """Remaining ties go in network order."""
    rank: int
    extra_parameters: int
    """Parameters of this level minus those of the level before."""


def adapter_parameters(rank: int, d: int, k: int) -> int:
    """Returns the number of trained parameters of a (d, k) layer at `rank`: two factors, or one dense delta."""
    return MatrixShape(d, k).parameters(rank)


def allocate_ranks(
    shapes: Mapping[str, tuple[int, int]],
    scores: Mapping[str, float] | None,
    parameter_budget: float,
    beta: float = 0.5,
    delta_min: float = 0.0,
    min_ranks: Mapping[str, int] | None = None,
    max_ranks: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Returns ranks by layer name that stay within a budget; the next step in line would not fit.

    Args:
        shapes: (d, k) of each targeted layer by name, in network order.
        scores: Contribution C_i >= 0 of exactly these layers, of any unit: only ratios matter. None is uniform.
        parameter_budget: Trained share of the targeted weights, in (0, 1].
        beta: Exponent >= 0; 0 gives every layer the same share, rank 0 where one rank costs more than that share.
            With beta > 0 a layer that scored 0 gets rank 0.
        delta_min: Share in [0, 1] that each layer may have before scores count, as far as whole ranks allow.
        min_ranks: Lowest rank of some layers, whatever their score; where a layer has no rank that high it is dense.
        max_ranks: Highest rank of some layers, whatever `delta_min`. A dense delta counts as rank min(d, k).

    Raises:
        ValueError: Scores and shapes name different layers, a score is negative or not finite, all scores are 0,
            the maxima leave no layer with a score a rank, the budget does not pay for the minima or for the first
            rank, or a bound is of an unknown layer or cannot be met.
    """
    if not shapes:
        raise ValueError("There is no layer to allocate ranks to: pass at least one shape.")
    shapes = {name: MatrixShape(*shape) for name, shape in shapes.items()}
    if scores is not None:
        check_same_names(scores, shapes, "contributions")
        check_scores(scores, "measure again")
    bounds = _rank_bounds(shapes, min_ranks or {}, max_ranks or {})
    total, allowed = _total_and_allowed(shapes.values(), parameter_budget)
    steps = _rank_steps(shapes, scores, beta, delta_min, bounds)
    if not steps:
        raise ValueError(_no_step_message(shapes, None if beta == 0 else scores, bounds))
    guaranteed = sum(step.extra_parameters for step in steps if step.log_alpha == -math.inf)
    if guaranteed > allowed:
        raise ValueError(
            f"The minima (delta_min, min_rank_pattern) alone take {guaranteed} parameters but the budget allows "
            f"{allowed} of {total}: lower them or set parameter_budget to at least {_budget_for(guaranteed, total)}."
        )
    if steps[0].extra_parameters > allowed:
        raise ValueError(
            f"The budget allows {allowed} of {total} parameters but the first rank takes {steps[0].extra_parameters}: "
            f"set parameter_budget to at least {_budget_for(steps[0].extra_parameters, total)}."
        )
    names = list(shapes)
    ranks = dict.fromkeys(names, 0)
    spent = 0
    for step in steps:
        spent += step.extra_parameters
        if spent > allowed:
            break
        ranks[names[step.layer_index]] = step.rank
    return ranks


def check_pays_for_a_rank(shapes: Iterable[tuple[int, int]], parameter_budget: float) -> None:
    """Refuses a budget that pays for no rank in any layer, whatever the scores.

    Raises:
        ValueError: It does, or there are no layers; the message names a budget that pays for the smallest.
    """
    shapes = [MatrixShape(*shape) for shape in shapes]
    if not shapes:
        raise ValueError("The network has no layer that CoLoRA adapts (Linear, convolutions).")
    total, allowed = _total_and_allowed(shapes, parameter_budget)
    smallest = min(shape.parameters(1) for shape in shapes)
    if smallest > allowed:
        raise ValueError(
            f"The budget allows {allowed} of {total} parameters but the smallest rank takes {smallest}: set "
            f"parameter_budget to at least {_budget_for(smallest, total)}."
        )


def common_rank(shapes: Iterable[tuple[int, int]], parameter_budget: float) -> int:
    """Returns the highest rank that all layers can have alike under the budget: LoRA as PEFT has it.

    Raises:
        ValueError: The budget does not pay for rank 1 in every layer; the message names one that does.
    """
    shapes = [MatrixShape(*shape) for shape in shapes]
    total, allowed = _total_and_allowed(shapes, parameter_budget)
    highest = max(shape.lowest_dense_rank for shape in shapes)
    costs = [sum(shape.parameters(rank) for shape in shapes) for rank in range(1, highest + 1)]
    if costs[0] > allowed:
        raise ValueError(
            f"The budget allows {allowed} of {total} parameters but rank 1 in every layer takes {costs[0]}: set "
            f"parameter_budget to at least {_budget_for(costs[0], total)}, or let contribution choose the layers."
        )
    return bisect_right(costs, allowed)  # costs never fall as the rank grows


def _rank_bounds(
    shapes: Mapping[str, MatrixShape], min_ranks: Mapping[str, int], max_ranks: Mapping[str, int]
) -> dict[str, tuple[int, int]]:
    """Returns (lowest, highest) level of each layer, as ranks that configurations hold."""
    check_known_names(min_ranks, shapes, "min_ranks")
    check_known_names(max_ranks, shapes, "max_ranks")
    bounds = {}
    for name, shape in shapes.items():
        least, most = min_ranks.get(name, 0), max_ranks.get(name, shape.dense_rank)
        lowest = next((level for level in [0, *shape.levels] if level >= least), shape.dense_rank)
        if lowest > most:
            dense = f" (from rank {shape.lowest_dense_rank} on it is dense, rank {shape.dense_rank})"
            raise ValueError(
                f"The layer {name!r} of shape {shape.d} x {shape.k} is to have at least rank {least} and at most rank "
                f"{most}, which no rank meets{dense if least <= most else ''}: lower its minimum or raise its maximum."
            )
        bounds[name] = (lowest, most)
    return bounds


def _rank_steps(
    shapes: Mapping[str, MatrixShape],
    scores: Mapping[str, float] | None,
    beta: float,
    delta_min: float,
    bounds: Mapping[str, tuple[int, int]],
) -> list[RankStep]:
    """Returns all steps of all layers in the order in which a growing alpha takes them."""
    uniform = scores is None or beta == 0
    highest = 1.0 if uniform else max(scores.values())
    steps = []
    for index, (name, shape) in enumerate(shapes.items()):
        score = 1.0 if uniform else scores[name]
        lowest, most = bounds[name]
        # Logarithms: C ** beta overflows or vanishes for scores that are far apart. Ratios: the unit cancels.
        log_weight = beta * (math.log(score) - math.log(highest)) if score > 0 else -math.inf
        cost = 0
        for rank in shape.levels:
            if rank > most:
                break
            extra = shape.parameters(rank) - cost
            cost += extra
            share = cost / shape.size
            is_guaranteed = share <= delta_min or rank <= lowest
            log_alpha = -math.inf if is_guaranteed else math.log(share) - log_weight
            if log_alpha < math.inf:
                steps.append(RankStep(log_alpha, -score, index, rank, extra))
    return sorted(steps)


def _no_step_message(
    shapes: Mapping[str, MatrixShape], scores: Mapping[str, float] | None, bounds: Mapping[str, tuple[int, int]]
) -> str:
    """Returns why no layer can have a rank, and the remedy; `scores` are None where they do not count."""
    lowest = {name: shape.levels[0] for name, shape in shapes.items()}
    wanted = [name for name in shapes if scores is None or scores[name] > 0]
    may_have_one = any(rank <= bounds[name][1] for name, rank in lowest.items())
    if not wanted and may_have_one:
        return "All contributions are 0: measure them again, or pass beta=0 for the same share everywhere."
    example = (wanted or list(shapes))[0]
    whose = "no layer with a contribution above 0" if may_have_one else "no layer"
    return f"The maximum ranks leave {whose} a rank: raise one, for example that of {example!r} to {lowest[example]}."


def _total_and_allowed(shapes: Iterable[MatrixShape], parameter_budget: float) -> tuple[int, int]:
    """Returns the number of all weights, and how many parameters the budget allows."""
    total = sum(shape.size for shape in shapes)
    # The decimal that was typed, not its binary neighbour: 0.29 of 100 weights are 29.
    return total, math.floor(Fraction(str(float(parameter_budget))) * total)


def _budget_for(parameters: int, total: int) -> float:
    """Returns the smallest budget that pays for `parameters` of `total` weights.

    It has six decimals, or nine where the sixth would be more than one weight.
    """
    digits = 6 if total <= 10**6 else 9
    return math.ceil(Fraction(parameters * 10**digits, total)) / 10**digits
