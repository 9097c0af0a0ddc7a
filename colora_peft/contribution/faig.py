"""Contribution along a path in weight space: FAIG, and the short full tuning that makes an end for it.

FAIG, filter attribution by integrated gradients: Xie et al., "Finding Discriminative Filters for Specific
Degradations in Blind Super-Resolution", NeurIPS 2021, arXiv 2108.01070. The weights walk straight from theta0
(pre-trained) to theta (tuned). Filter j of layer i is worth

    F_ij = | sum over the filter's weights of (theta - theta0) * mean_t dL/dtheta(theta0 + t (theta - theta0)) |

and the layer's score C_i is the mean over its weights, sum_j F_ij / number of weights, so that layers of different
size compare. Filter j is the part of the weight at j along its first axis.

Our choice: t runs over midpoints (m + 0.5) / M, exact for a quadratic loss. Frozen parameters move along; buffers are
those of theta0 at every point, whatever the tuning made of them.
"""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from colora_peft.ranks import ContributionScores

from .layer_scores import check_finite, filter_score, scored_weights, unreached_layers
from .objective import GradientSums, MeanLoss, backward, checked_loss, no_batches_message
from .weight_space import load_path_point, load_weights, moving_parameters


def integrate_path(
    objective: MeanLoss, start: Mapping[str, Tensor], end: Mapping[str, Tensor], num_path_steps: int, progress: bool
) -> ContributionScores:
    """Returns the scores of FAIG from `start` to `end`; the model is left at `end`, and the caller puts it back.

    It costs num_path_steps + 2 passes over the batches, and one set of weights beside `start` and `end`.
    """
    model, processes = objective.model, objective.processes
    loss_start, num_batches = objective.value("at the start weights")
    sums = GradientSums.zeros(dict(start))
    with tqdm(range(num_path_steps), desc="FAIG path", disable=not progress) as bar:
        for step in bar:
            t = (step + 0.5) / num_path_steps
            load_path_point(model, start, end, t)
            with processes.failing_together():
                loss_sum, seen = objective.add_gradients(sums, f"at {t:.3f} of the path")
                if seen != num_batches:
                    raise ValueError(
                        f"The `batches` were {num_batches} on the first pass and {seen} on a later one: pass a list "
                        "or a DataLoader that gives the same batches each time."
                    )
            bar.set_postfix(loss=f"{processes.sum_of_numbers(loss_sum) / num_batches:.4g}")
    sums.sum_over(processes)
    load_weights(model, end)
    loss_end, _ = objective.value("at the end weights")

    path_integral = 0.0
    for name, total in sums.totals.items():
        mean_gradient = total.div_(num_path_steps * num_batches)
        attribution = mean_gradient.mul_(end[name].to(total) - start[name].to(total))
        path_integral += attribution.sum(dtype=torch.float64).item()
    weights = scored_weights(model)
    scores = {layer: filter_score(sums.totals[name]) for layer, name in weights.items()}
    check_finite(scores, path_integral)
    return ContributionScores(
        scores=scores,
        method="faig",
        num_batches=num_batches,
        loss_start=loss_start,
        loss_end=loss_end,
        path_integral=path_integral,
        num_path_steps=num_path_steps,
        unreached=unreached_layers(weights, sums.reached),
    )


def tuned_weights(objective: MeanLoss, num_steps: int, learning_rate: float, progress: bool) -> dict[str, Tensor]:
    """Returns copies of all parameters after a short full tuning; the model is left there, the caller puts it back.

    AdamW runs over the batches again and again, without weight decay, which would move weights that the loss never
    reaches. Every process takes the steps, each with a whole batch. All get the main one's weights, to walk to the
    same point.
    """
    parameters = moving_parameters(objective.model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate, weight_decay=0.0)
    with objective.processes.failing_together(), tqdm(total=num_steps, desc="probe", disable=not progress) as bar:
        for step, batch in _batches_over_and_over(objective, num_steps):
            where = f"probe step {step} (learning rate {learning_rate})"
            torch.clear_autocast_cache()
            loss = checked_loss(objective.loss_fn(objective.model, batch), where)
            backward(loss, where)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.4g}")
    copies = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return {name: objective.processes.tensor_from_main(value) for name, value in copies.items()}


def _batches_over_and_over(objective: MeanLoss, num_steps: int) -> Iterator[tuple[int, Any]]:
    """Yields the number and the batch of each step."""
    done = 0
    while done < num_steps:
        before_pass = done
        for batch in islice(objective.batches, num_steps - done):
            yield done, batch
            done += 1
        if done == before_pass:
            raise ValueError(no_batches_message(objective.batches))
