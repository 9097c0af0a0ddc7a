"""How many ranks each layer gets under a budget of trained parameters (pure functions of shapes and scores).

A layer i of shape (d, k) with contribution C_i is to train the share

    delta_i = clip(alpha * C_i ** beta, delta_min, 1)

of its d * k weights, alpha being as large as `parameter_budget` of all targeted weights allows. That ranks follow
contribution, and a ratio of learnable parameters of each layer, are the paper's (arXiv 2408.01099); the power law,
`beta` and `delta_min` are our choice, because the formula is not in our sources: one exponent that goes from the
same share everywhere (beta = 0) to shares proportional to contribution (beta = 1). As far as whole ranks allow: of a
thin layer (depthwise, first or last) one rank may be more than the common share, and then it gets rank 0.

Ranks are whole, so a layer climbs levels: rank 1, 2, ..., the last rank whose factors cost less than the weight
itself, then dense (written as rank min(d, k)). It reaches a level of share s when alpha = s / C_i ** beta. Sorting the
steps of all layers by that alpha and taking the longest prefix that fits solves for alpha exactly, and makes a larger
budget a superset of a smaller one. A layer's minimum rank grants it the first levels whatever alpha is; its maximum
takes the last ones away, and what they would have cost goes to the others.
"""

import difflib
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import NamedTuple

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
    """What this level costs more than the level before."""


def is_dense(rank: int, d: int, k: int) -> bool:
    """Whether factors of `rank` would cost at least as much as the (d, k) weight, so that the delta is kept dense."""
    return rank > 0 and rank * (d + k) >= d * k


def stored_rank(rank: int, d: int, k: int) -> int:
    """The rank as written into configs: min(d, k) where the delta is dense, else `rank` itself."""
    return min(d, k) if is_dense(rank, d, k) else rank


def adapter_parameters(rank: int, d: int, k: int) -> int:
    """Number of trained parameters of a (d, k) layer at `rank`: two factors, or one dense delta if that is less."""
    return min(rank * (d + k), d * k)


def allocate_ranks(
    shapes: Mapping[str, tuple[int, int]],
    scores: Mapping[str, float] | None,
    parameter_budget: float,
    beta: float = 0.5,
    delta_min: float = 0.0,
    min_ranks: Mapping[str, int] | None = None,
    max_ranks: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Ranks by layer name under a budget, never exceeding it; the next step in line would not fit.

    Args:
        shapes: (d, k) of each targeted layer by name, in network order.
        scores: Contribution C_i >= 0 of exactly these layers, of any unit: only ratios matter. None is uniform.
        parameter_budget: Trained share of the targeted weights, in (0, 1].
        beta: Exponent >= 0; 0 gives every layer the same share, rank 0 where one rank costs more than that share.
            With beta > 0 a layer that scored 0 gets rank 0.
        delta_min: Share in [0, 1] that each layer may have before scores count, as far as whole ranks allow.
        min_ranks: Rank of some layers at least, whatever their score; where a layer has no rank that high it is dense.
        max_ranks: Rank of some layers at most, whatever `delta_min`. A dense delta counts as rank min(d, k).

    Raises:
        ValueError: Scores and shapes name different layers, a score is negative or not finite, all scores are 0,
            the maxima leave no layer with a score a rank, the budget does not pay for the minima or for the first
            rank, or a bound is of an unknown layer or cannot be met.
    """
    if not shapes:
        raise ValueError("There is no layer to allocate ranks to: pass at least one shape.")
    if scores is not None:
        check_same_names(scores, shapes, "contributions")
        check_scores(scores, "measure again")
    bounds = _rank_bounds(shapes, min_ranks or {}, max_ranks or {})
    total = sum(d * k for d, k in shapes.values())
    allowed = _allowed_parameters(parameter_budget, total)
    steps = _rank_steps(shapes, scores, beta, delta_min, bounds)
    if not steps:
        raise ValueError(_no_step_message(shapes, None if beta == 0 else scores, bounds))
    guaranteed = sum(step.extra_parameters for step in steps if step.log_alpha == -math.inf)
    _check_budget(allowed, total, guaranteed, steps[0].extra_parameters)

    names = list(shapes)
    ranks = dict.fromkeys(names, 0)
    spent = 0
    for step in steps:
        spent += step.extra_parameters
        if spent > allowed:
            break
        ranks[names[step.layer_index]] = step.rank
    return ranks


def common_rank(shapes: Iterable[tuple[int, int]], parameter_budget: float) -> int:
    """The highest rank that all layers can have alike under the budget: LoRA as PEFT has it.

    Raises:
        ValueError: if the budget does not pay for rank 1 in every layer; says which does.
    """
    shapes = list(shapes)
    total = sum(d * k for d, k in shapes)
    allowed = _allowed_parameters(parameter_budget, total)
    costs = [
        sum(adapter_parameters(rank, d, k) for d, k in shapes)
        for rank in range(1, max(lowest_dense_rank(d, k) for d, k in shapes) + 1)
    ]
    if costs[0] > allowed:
        raise ValueError(
            f"The budget allows {allowed} of {total} parameters but rank 1 in every layer takes {costs[0]}: set "
            f"parameter_budget to at least {_budget_for(costs[0], total)}, or let contribution choose the layers."
        )
    return bisect_right(costs, allowed)  # costs never fall as the rank grows


def check_same_names(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Check that `given` names every layer of `known` and no other.

    Raises:
        ValueError: Naming the first stranger with its nearest relatives, or the first layer left out.
    """
    given, known = list(given), list(known)
    for name in given:
        if name not in set(known):
            raise ValueError(unknown_layer_message(name, known, what))
    missing = [name for name in known if name not in set(given)]
    if missing:
        raise ValueError(
            f"The targeted layer {missing[0]!r} is missing from `{what}` ({len(missing)} of {len(known)} are): "
            f"add it, or exclude it with `exclude_modules`."
        )


def unknown_layer_message(name: str, known: Iterable[str], what: str) -> str:
    """One sentence that says `what` names a layer which is not there, with up to three close matches."""
    return (
        f"The name {name!r} in `{what}` is not that of a layer that can be adapted here ({names_hint(name, known)})."
    )


def names_hint(name: str, known: Iterable[str]) -> str:
    """What may have been meant by `name`: up to three close matches."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else "use the names of model.named_modules()"


def _rank_bounds(
    shapes: Mapping[str, tuple[int, int]], min_ranks: Mapping[str, int], max_ranks: Mapping[str, int]
) -> dict[str, tuple[int, int]]:
    """(lowest, highest) level of each layer, as ranks that configs hold.

    Raises:
        ValueError: A bound is of an unknown layer, or a layer has no level between its two; names it.
    """
    for what, given in (("min_ranks", min_ranks), ("max_ranks", max_ranks)):
        for name in given:
            if name not in shapes:
                raise ValueError(unknown_layer_message(name, shapes, what))
    bounds = {}
    for name, (d, k) in shapes.items():
        least, most = min_ranks.get(name, 0), max_ranks.get(name, min(d, k))
        lowest = next((level for level in [0, *_levels(d, k)] if level >= least), min(d, k))
        if lowest > most:
            dense = f" (from rank {lowest_dense_rank(d, k)} on it is dense, rank {min(d, k)})" if least <= most else ""
            raise ValueError(
                f"The layer {name!r} of shape {d} x {k} is to have at least rank {least} and at most rank {most}, "
                f"which no rank meets{dense}: lower its minimum or raise its maximum."
            )
        bounds[name] = (lowest, most)
    return bounds


def lowest_dense_rank(d: int, k: int) -> int:
    """The rank from which on factors of a (d, k) weight cost at least as much as the weight."""
    return -(-d * k // (d + k))


def _levels(d: int, k: int) -> list[int]:
    """The ranks above 0 that a (d, k) layer climbs, the last of them dense."""
    return [*range(1, lowest_dense_rank(d, k)), min(d, k)]


def _rank_steps(
    shapes: Mapping[str, tuple[int, int]],
    scores: Mapping[str, float] | None,
    beta: float,
    delta_min: float,
    bounds: Mapping[str, tuple[int, int]],
) -> list[RankStep]:
    """All steps of all layers in the order in which a growing alpha takes them."""
    uniform = scores is None or beta == 0
    highest = 1.0 if uniform else max(scores.values())
    steps = []
    for index, (name, (d, k)) in enumerate(shapes.items()):
        score = 1.0 if uniform else scores[name]
        lowest, most = bounds[name]
        # Logarithms: C ** beta overflows or vanishes for scores that are far apart. Ratios: the unit cancels.
        log_weight = beta * (math.log(score) - math.log(highest)) if score > 0 else -math.inf
        cost = 0
        for rank in _levels(d, k):
            if rank > most:
                break
            extra = adapter_parameters(rank, d, k) - cost
            cost += extra
            share = cost / (d * k)
            is_guaranteed = share <= delta_min or rank <= lowest
            log_alpha = -math.inf if is_guaranteed else math.log(share) - log_weight
            if log_alpha < math.inf:
                steps.append(RankStep(log_alpha, -score, index, rank, extra))
    return sorted(steps)


def _no_step_message(
    shapes: Mapping[str, tuple[int, int]], scores: Mapping[str, float] | None, bounds: Mapping[str, tuple[int, int]]
) -> str:
    """Why no layer can have a rank, and what to change; `scores` are None where they do not count."""
    lowest = {name: _levels(d, k)[0] for name, (d, k) in shapes.items()}
    wanted = [name for name in shapes if scores is None or scores[name] > 0]
    may_have_one = any(rank <= bounds[name][1] for name, rank in lowest.items())
    if not wanted and may_have_one:
        return "All contributions are 0: measure them again, or pass beta=0 for the same share everywhere."
    example = (wanted or list(shapes))[0]
    whose = "no layer with a contribution above 0" if may_have_one else "no layer"
    return f"The maximum ranks leave {whose} a rank: raise one, for example that of {example!r} to {lowest[example]}."


def _check_budget(allowed: int, total: int, guaranteed: int, first_step: int) -> None:
    """Check that `allowed` parameters pay for what minima guarantee and for the first step.

    Raises:
        ValueError: They do not; says how many are needed and the smallest budget that works.
    """
    if guaranteed > allowed:
        raise ValueError(
            f"The minima (delta_min, min_rank_pattern) alone take {guaranteed} parameters but the budget allows "
            f"{allowed} of {total}: lower them or set parameter_budget to at least {_budget_for(guaranteed, total)}."
        )
    if first_step > allowed:
        raise ValueError(
            f"The budget allows {allowed} of {total} parameters but the first rank takes {first_step}: "
            f"set parameter_budget to at least {_budget_for(first_step, total)}."
        )


def _allowed_parameters(parameter_budget: float, total: int) -> int:
    # The decimal that was typed, not its binary neighbour: 0.29 of 100 weights are 29.
    return math.floor(Fraction(str(float(parameter_budget))) * total)


def _budget_for(parameters: int, total: int) -> float:
    """The smallest budget that pays for `parameters` of `total` weights: of six decimals, or of nine where the sixth
    would be more than one weight."""
    digits = 6 if total <= 10**6 else 9
    return math.ceil(Fraction(parameters * 10**digits, total)) / 10**digits
