"""Contribution estimated from the gradients at the pre-trained weights alone: one pass over the batches.

Let g be the gradient of the mean loss L at the pre-trained weights w, and n the number of a layer's weights.

gradient: sum |g| / n. Up to the factor lr, this is the first-order FAIG (g is constant along the path) of one step of
    sign descent, dw = -lr * sign(g). Then dw * g = -lr * |g| has one sign everywhere. So nothing cancels within a
    filter, and absolute values per weight or per filter are the same. Adam's first step is that step, up to its
    epsilon. So a probe of one step on one batch tends to this score as its learning rate goes to 0.
fisher: sum of g_b ** 2 / n, averaged over the batches b, where g_b is the gradient of one batch. This is the diagonal
    of the empirical Fisher information. After Theis et al., "Faster gaze prediction with dense networks and Fisher
    pruning", 2018, arXiv 1801.05787, who square the gradient of each sample, with a factor 1/2, for feature maps. Per
    batch and per weight are our choices; the first costs one pass instead of one for each sample. The unit is
    squared: beta = 0.25 does to it what 0.5 does to the others.
taylor: sum over the filters of |sum over a filter's weights of w * g| / n. To first order, this is how much L would
    change if a filter were set to 0. After Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR
    2019, arXiv 1906.10771, who square the sum over a filter. Our choices are the absolute value, in the unit of the
    loss as FAIG's, and the gradient of the mean loss instead of that of each batch. Filters are those of FAIG.
"""

from operator import length_hint
from typing import Literal, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from colora_peft.ranks import ContributionScores

from .layer_scores import check_finite, filter_score, scored_weights, unreached_layers
from .objective import GradientSums, MeanLoss
from .weight_space import moving_parameters, sum_dtype

OnePassEstimator = Literal["gradient", "fisher", "taylor"]
ONE_PASS_ESTIMATORS: tuple[str, ...] = get_args(OnePassEstimator)


def score_in_one_pass(objective: MeanLoss, estimator: OnePassEstimator, progress: bool) -> ContributionScores:
    """Scores every adaptable layer at the current weights; takes memory for one copy of the layers' weights."""
    weights = scored_weights(objective.model)
    parameters = moving_parameters(objective.model)
    sums = GradientSums.zeros({name: parameters[name] for name in weights.values()}, squared=estimator == "fisher")
    with tqdm(total=length_hint(objective.batches) or None, desc=estimator, disable=not progress) as bar:
        loss, num_batches = objective.mean_gradients(sums, "at the pre-trained weights", bar)
    scores = {
        layer: _score(estimator, sums.totals[name], parameters[name].detach()) for layer, name in weights.items()
    }
    check_finite(scores)
    return ContributionScores(
        scores=scores,
        method=estimator,
        num_batches=num_batches,
        loss_start=loss,
        unreached=unreached_layers(weights, sums.reached),
    )


def _score(estimator: OnePassEstimator, mean: Tensor, weight: Tensor) -> float:
    """Returns a layer's score from the mean over the batches of its gradient (fisher: of the squared one)."""
    if estimator == "taylor":
        return filter_score(mean * weight.to(sum_dtype(weight)))
    return mean.abs().sum(dtype=torch.float64).item() / mean.numel()
