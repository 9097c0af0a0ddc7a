"""The factor before the delta, by which one learning rate is to serve every rank."""

import math

from .allocation import is_dense

__all__ = ["adapter_scaling"]


def adapter_scaling(rank: int, d: int, k: int, colora_alpha: float) -> float:
    """Factor before the delta of a (d, k) layer: colora_alpha / sqrt(rank) for factors, / sqrt(k) for a dense delta.

    Our choice, not the paper's: one learning rate shall suit every rank. Adam moves each parameter by about lr a step,
    whatever its gradient. With A ~ N(0, 1/k) and B = 0 the first step changes an entry of W by

        scaling * lr * |sum of rank entries of A, signs at random| ~ scaling * lr * sqrt(rank) / sqrt(k)

    through factors, and by scaling * lr through a dense delta. The rule makes both colora_alpha * lr / sqrt(k): the
    same at any rank, and the same share of the 1/sqrt(k) at which weights of fan-in k usually lie. (In a transposed
    convolution k is the fan-out of one input channel instead.)

    Measured (examples/compare_scaling.py, benchmark_results/scaling.md, one seed), the rule falls short: the best rate
    of rank 1 lies at least four times above that of a dense delta. Rule "linear_unit" of that script does better.
    """
    return colora_alpha / math.sqrt(k if is_dense(rank, d, k) else rank)
