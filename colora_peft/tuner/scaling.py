"""The factor before the delta and the start of A, chosen so that one learning rate serves every rank.

New adapters have the rule of `METHOD_VERSION`. Those of older versions keep theirs, so that they compute as they did.
"""

import math

from colora_peft.ranks import MatrixShape

METHOD_VERSION = 2
"""Version of the adapter file format. Increase it when older and newer releases would misread each other's files.

1 and 2 differ in `adapter_scaling` alone. The first files name no version.
"""

STD_OF_A = 1.0
"""Standard deviation of A at the start; see `adapter_scaling`."""


def adapter_scaling(rank: int, d: int, k: int, colora_alpha: float, method_version: int = METHOD_VERSION) -> float:
    """Returns the factor before the delta of a (d, k) layer.

    It is colora_alpha / (rank sqrt(k)) for factors and colora_alpha / k for a dense delta; in method_version 1 it was
    colora_alpha / sqrt(rank) and colora_alpha / sqrt(k). This is our choice, not the paper's: one learning rate shall
    suit every rank. So the *output* of the layer must move equally far on the inputs that it sees. Adam moves each
    parameter by about lr a step, whatever its gradient. For an input x the gradient of a dense delta D has the signs
    of x, and that of B the signs of A x. So all entries push the output the same way. With A ~ N(0, 1) and B = 0 the
    first step moves each output by

        scaling * lr * sum of rank entries |A x|  ~  scaling * lr * 0.8 rank |x|

    through factors, and by scaling * lr * |x|_1 ~ scaling * lr * 0.8 sqrt(k) |x| through a dense delta (for inputs
    that are spread about like N(0, 1), whose mean of absolute values is 0.8 = sqrt(2/pi)). The rule makes both
    0.8 * colora_alpha * lr * |x| / sqrt(k). Equal movement of the *weights* would ask for 1 / sqrt(rank) instead, as
    the ranks of a pair move an entry of W in random directions; but they all move the output of x in one.

    A is large because the first step is not the last. Its entries move by lr as well, and turn towards the input.
    After t steps in which no gradient changed its sign, factors have moved the output 1 + sqrt(k) lr t times as far
    as a dense delta has. Drawn from N(0, 1 / k) they would have moved it 1 + k lr t times as far. At k = 144, lr =
    2e-3 and t = 40 these are 2 and 13 times. Beyond such runs of equal signs only measurements tell.

    In a transposed convolution k is the fan-out of one input channel instead of a fan-in.

    Measured beside the rule that it replaced: examples/experiments/scaling.
    """
    if method_version == 1:
        return colora_alpha / math.sqrt(k if MatrixShape(d, k).is_dense(rank) else rank)
    return colora_alpha / (k if MatrixShape(d, k).is_dense(rank) else rank * math.sqrt(k))
