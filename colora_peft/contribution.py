"""How much each layer contributes to a new task: FAIG scores.

FAIG, filter attribution by integrated gradients: Xie et al., "Finding Discriminative Filters for Specific
Degradations in Blind Super-Resolution", NeurIPS 2021, arXiv 2108.01070. The weights walk straight from theta0
(pre-trained) to theta (tuned); filter j of layer i is worth

    F_ij = | sum over the filter's weights of (theta - theta0) * mean_t dL/dtheta(theta0 + t (theta - theta0)) |

and the layer's score C_i is the mean over its weights, sum_j F_ij / number of weights, so that layers of different
size compare. Filter j is what lies at j along the first axis of the weight.

Our choices: t runs over midpoints (m + 0.5) / M, exact for a quadratic loss; L is the mean of the loss over the
batches; the network is in eval mode throughout (frozen batch statistics, no dropout) and every pass over the batches
starts from the same RNG state, so that L is one fixed function of the weights and the completeness law holds. Buffers
stay those of theta0.

An estimator is a function that takes (model, batches, loss_fn) and gives a ContributionScores; settings come after
these. Pass the function itself (or a functools.partial of it) around, never its name: a further estimator is a
further function.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .adaptable import SUPPORTED_LAYERS, adaptable_layers
from .contribution_scores import ContributionScores
from .weight_path import (
    RngStates,
    checked_end_weights,
    load_path_point,
    load_weights,
    moving_parameters,
    restored_afterwards,
    rng_states,
    set_rng_states,
    sum_dtype,
)

__all__ = ["DEFAULT_NUM_PATH_STEPS", "ContributionScores", "LossFn", "ProbeSettings", "faig", "probe"]

# Twice the probe's: end weights from anywhere may lie farther away.
DEFAULT_NUM_PATH_STEPS = 16

LossFn = Callable[[nn.Module, Any], Tensor]


def _check_at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"The setting {name} is {value}: it must be at least 1.")


@dataclass(frozen=True)
class ProbeSettings:
    """The short full tuning of `probe`, and the path that is walked afterwards.

    Attributes:
        num_steps: steps of AdamW.
        learning_rate: the same at each of them.
        num_path_steps: midpoints on the path, as for `faig`; fewer than its default, as the path is short.

    Raises:
        ValueError: less than one step or midpoint, or a learning rate that is not positive and finite.
    """

    num_steps: int = 50
    learning_rate: float = 3e-4
    num_path_steps: int = 8

    def __post_init__(self) -> None:
        _check_at_least_one("num_steps", self.num_steps)
        _check_at_least_one("num_path_steps", self.num_path_steps)
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"The setting learning_rate is {self.learning_rate}: it must be positive and finite.")


def faig(
    model: nn.Module,
    end_state: Mapping[str, Tensor],
    batches: Iterable[Any],
    loss_fn: LossFn,
    num_path_steps: int = DEFAULT_NUM_PATH_STEPS,
    progress: bool = False,
) -> ContributionScores:
    """Score every adaptable layer by FAIG, from the model's current weights to `end_state`.

    Costs num_path_steps + 2 passes over the batches. Memory: three copies of the weights beside the activations of
    one batch, whatever the number of batches and steps. Weights, buffers, `requires_grad`, `.grad`, training mode and
    torch's RNG are afterwards exactly what they were, also when `loss_fn` raises. Frozen parameters move along the
    path as well.

    Args:
        model: any module; its current weights are theta0.
        end_state: parameter tensors by name, as `tuned_model.state_dict()` gives them; buffers in it are ignored.
        batches: whatever `loss_fn` takes, iterated anew for each pass: a list or a DataLoader, not a generator.
        loss_fn: `loss_fn(model, batch)` gives a scalar tensor; it may use autocast.
        num_path_steps: midpoints M on the path; more of them lower `completeness_error`.
        progress: show a bar over the path steps.

    Raises:
        ValueError: weights missing in `end_state`, unexpected, of another shape, not finite, or all equal to the
            start; no batches; a loss that is no scalar, not finite, or without gradient; a model without adaptable
            layer.
    """
    started = time.perf_counter()
    _check_at_least_one("num_path_steps", num_path_steps)
    _check_request(model, batches)
    end = checked_end_weights(model, end_state)
    with restored_afterwards(model) as start:
        objective = _Objective(model, batches, loss_fn, rng_states())
        result = _integrate(objective, start, end, num_path_steps, progress)
    return replace(result, seconds=time.perf_counter() - started)


def probe(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    settings: ProbeSettings = ProbeSettings(),
    progress: bool = False,
) -> ContributionScores:
    """Score every adaptable layer by FAIG along a short full tuning, when no tuned network is at hand.

    All parameters are tuned with AdamW (no weight decay, which would move weights the loss never reaches), cycling
    over the batches; then FAIG runs on the same batches towards the weights reached. The completeness error stays
    below 2% on a NAFNet (tests/test_contribution.py). The model is restored as by `faig`.

    Raises:
        ValueError: as `faig`.
    """
    started = time.perf_counter()
    _check_request(model, batches)
    with restored_afterwards(model) as start:
        objective = _Objective(model, batches, loss_fn, rng_states())
        end = _tuned_weights(objective, settings, progress)
        load_weights(model, start)
        result = _integrate(objective, start, checked_end_weights(model, end), settings.num_path_steps, progress)
    return replace(result, method="probe", seconds=time.perf_counter() - started)


@dataclass(frozen=True)
class _Objective:
    """The mean loss over the batches, as one fixed function of the model's current weights."""

    model: nn.Module
    batches: Iterable[Any]
    loss_fn: LossFn
    rng_states: RngStates

    def losses(self, where: str) -> Iterator[Tensor]:
        """One pass over the batches: the loss of each (scalar, with graph where grad mode is on)."""
        # The same shuffle and the same draws at every point of the path: else L would be another function at each.
        set_rng_states(self.rng_states)
        # Under the caller's autocast, low-precision copies of the weights as they were at the last point may be
        # cached.
        torch.clear_autocast_cache()
        for index, batch in enumerate(self.batches):
            yield _checked_loss(self.loss_fn(self.model, batch), f"batch {index} {where}")

    def mean(self, where: str) -> tuple[float, int]:
        """The mean loss and the number of batches; no gradients."""
        with torch.no_grad():
            values = [loss.item() for loss in self.losses(where)]
        if not values:
            raise ValueError(_no_batches_message(self.batches))
        return sum(values) / len(values), len(values)

    def add_gradients(self, totals: dict[str, Tensor], where: str) -> tuple[float, int]:
        """Add the gradients of one pass to `totals`, in place; the mean loss and the number of batches."""
        parameters = moving_parameters(self.model)
        loss_sum, num_batches = 0.0, 0
        for loss in self.losses(where):
            _backward(loss, f"batch {num_batches} {where}")
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    totals[name].add_(parameter.grad)
                    parameter.grad = None
            loss_sum += loss.item()
            num_batches += 1
        return loss_sum / max(num_batches, 1), num_batches


def _integrate(
    objective: _Objective, start: dict[str, Tensor], end: dict[str, Tensor], num_path_steps: int, progress: bool
) -> ContributionScores:
    """FAIG from `start` to `end`; the model is left at `end`, the caller restores it."""
    model = objective.model
    loss_start, num_batches = objective.mean("at the start weights")
    totals = {name: torch.zeros_like(value, dtype=sum_dtype(value)) for name, value in start.items()}
    with tqdm(range(num_path_steps), desc="FAIG path", disable=not progress) as bar:
        for step in bar:
            t = (step + 0.5) / num_path_steps
            load_path_point(model, start, end, t)
            loss, seen = objective.add_gradients(totals, f"at {t:.3f} of the path")
            if seen != num_batches:
                raise ValueError(
                    f"The `batches` were {num_batches} on the first pass and {seen} on a later one: pass a list "
                    "or a DataLoader that gives the same batches each time."
                )
            bar.set_postfix(loss=f"{loss:.4g}")
    load_weights(model, end)
    loss_end, _ = objective.mean("at the end weights")

    path_integral = 0.0
    for name, total in totals.items():
        mean_gradient = total.div_(num_path_steps * num_batches)
        attribution = mean_gradient.mul_(end[name].to(total) - start[name].to(total))
        path_integral += attribution.sum(dtype=torch.float64).item()
    scores = _layer_scores(model, totals)
    if not math.isfinite(path_integral):
        raise ValueError(
            "The gradient of a bias or norm overflowed although the loss is finite: use float32 instead of half "
            "precision, or check the loss."
        )
    return ContributionScores(
        scores=scores,
        method="faig",
        num_path_steps=num_path_steps,
        num_batches=num_batches,
        loss_start=loss_start,
        loss_end=loss_end,
        path_integral=path_integral,
        seconds=0.0,
    )


def _layer_scores(model: nn.Module, attributions: Mapping[str, Tensor]) -> dict[str, float]:
    """Sum of each layer's |F_ij| over its number of weights, for the adaptable layers in network order."""
    names = {id(parameter): name for name, parameter in moving_parameters(model).items()}
    scores = {}
    for layer_name, layer in adaptable_layers(model).items():
        weight_name = names.get(id(layer.weight))
        if weight_name is None:
            raise ValueError(
                f"Layer '{layer_name}': its weight is no parameter of the model (a parametrization, weight_norm?): "
                "remove it first, for example with torch.nn.utils.parametrize.remove_parametrizations."
            )
        attribution = attributions[weight_name]
        filters = attribution.flatten(1).sum(dim=1, dtype=torch.float64)
        score = filters.abs().sum().item() / attribution.numel()
        if not math.isfinite(score):
            raise ValueError(
                f"Layer '{layer_name}': its score is {score}, so the gradient overflowed although the loss is finite: "
                "use float32 instead of half precision, or check the loss."
            )
        scores[layer_name] = score
    return scores


def _tuned_weights(objective: _Objective, settings: ProbeSettings, progress: bool) -> dict[str, Tensor]:
    """Copies of all parameters after the probe's tuning; the model is left there, the caller restores it."""
    parameters = moving_parameters(objective.model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.learning_rate, weight_decay=0.0)
    done, num_steps = 0, settings.num_steps
    with tqdm(total=num_steps, desc="probe", disable=not progress) as bar:
        while done < num_steps:
            before_pass = done
            for batch in islice(objective.batches, num_steps - done):
                where = f"probe step {done} (learning rate {settings.learning_rate})"
                torch.clear_autocast_cache()
                loss = _checked_loss(objective.loss_fn(objective.model, batch), where)
                _backward(loss, where)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                done += 1
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.4g}")
            if done == before_pass:
                raise ValueError(_no_batches_message(objective.batches))
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def _backward(loss: Tensor, where: str) -> None:
    if not loss.requires_grad:
        raise ValueError(
            f"The loss for {where} has no gradient: loss_fn must compute it from the model's output without detach() "
            "or no_grad()."
        )
    loss.backward()


def _checked_loss(loss: Any, where: str) -> Tensor:
    """The loss as a 0-dim tensor."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ValueError(
            f"The loss_fn gave {found} for {where}: it must return a scalar tensor, for example the mean."
        )
    if not torch.isfinite(loss).item():
        raise ValueError(
            f"The loss is {loss.item()} for {where}: check the images for NaN and the weights, or lower the "
            "learning rate they are tuned with."
        )
    return loss.reshape(())


def _no_batches_message(batches: Iterable[Any]) -> str:
    if getattr(batches, "drop_last", False):
        return (
            "The `batches` are empty: the loader drops the last batch when that is not full, so lower its batch_size."
        )
    return "The `batches` are empty: pass at least one batch."


def _check_request(model: nn.Module, batches: Iterable[Any]) -> None:
    if not adaptable_layers(model):
        raise ValueError(f"{type(model).__name__} has no layer to score, which are those of kind {SUPPORTED_LAYERS}.")
    if not isinstance(batches, Iterable) or isinstance(batches, Iterator):
        raise ValueError(
            f"The `batches` are a {type(batches).__name__}, which cannot be iterated anew for each pass: pass a list "
            "or a DataLoader."
        )
