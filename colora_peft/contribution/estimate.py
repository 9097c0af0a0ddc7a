"""How much each layer contributes to a new task: `estimate_contributions`, the one way to ask.

The estimators:

- "faig" walks from the pre-trained weights to those of a network that was tuned in full, as in the paper (faig.py);
- "probe" tunes for some steps itself and walks there (faig.py);
- "gradient", "fisher" and "taylor" use the gradients at the pre-trained weights only (one_pass.py).

Our choices for all of them: L is the mean of the loss over the batches. The network is in eval mode throughout (frozen
batch statistics, no dropout), unless the loss sets the training mode. Each batch begins with a seed of its own, drawn
from torch's RNG, and with the same buffers. So L is one fixed function of the weights, and the completeness law holds.
"""

import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from torch import Tensor, nn

from colora_peft.ranks import ContributionScores, adaptable_layers, no_adaptable_layer
from colora_peft.utils import Processes, some

from .faig import integrate_path, tuned_weights
from .objective import LossFn, MeanLoss
from .one_pass import ONE_PASS_ESTIMATORS, OnePassEstimator, score_in_one_pass
from .weight_space import checked_end_weights, load_weights, put_back_afterwards

Estimator = Literal["faig", "probe", OnePassEstimator]
ESTIMATORS: tuple[str, ...] = get_args(Estimator)


def _check_at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"The setting {name} is {value}: it must be at least 1.")


@dataclass(frozen=True)
class FaigSettings:
    """The path that "faig" walks.

    Attributes:
        num_path_steps: Number of midpoints on the path, a pass over the batches each; more of them lower
            `completeness_error`. The default is higher than the probe's: given end weights may lie farther away.

    Raises:
        ValueError: num_path_steps is below 1.
    """

    num_path_steps: int = 16

    def __post_init__(self) -> None:
        _check_at_least_one("num_path_steps", self.num_path_steps)


@dataclass(frozen=True)
class ProbeSettings:
    """The short full tuning of "probe", and the path that is walked afterwards.

    Attributes:
        num_steps: Number of steps of AdamW.
        learning_rate: Learning rate of every step.
        num_path_steps: Number of midpoints on the path, as for "faig"; a short path needs fewer.

    Raises:
        ValueError: A number of steps is below 1, or the learning rate is not positive and finite.
    """

    num_steps: int = 20
    learning_rate: float = 3e-4
    num_path_steps: int = 4

    def __post_init__(self) -> None:
        _check_at_least_one("num_steps", self.num_steps)
        _check_at_least_one("num_path_steps", self.num_path_steps)
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"The setting learning_rate is {self.learning_rate}: it must be positive and finite.")


_DEFAULT_SETTINGS: Mapping[str, FaigSettings | ProbeSettings] = {"faig": FaigSettings(), "probe": ProbeSettings()}


def estimate_contributions(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    estimator: Estimator = "gradient",
    *,
    end_state: Mapping[str, Tensor] | None = None,
    settings: FaigSettings | ProbeSettings | None = None,
    accelerator: Accelerator | None = None,
    progress: bool = False,
) -> ContributionScores:
    """Scores every adaptable layer of a network by its contribution to a task.

    Nothing of the model changes, also when `loss_fn` raises: weights, buffers, `requires_grad`, `.grad` and training
    mode. The RNGs of Python, NumPy and torch, and those that a loader was given, are put back. Frozen layers are
    scored like the others. Memory does not depend on the number of batches. Besides the activations of one batch, the
    path estimators hold three copies of the weights ("probe" also AdamW's two while it tunes), the others one.

    Args:
        model: Any module, not wrapped for several processes; its current weights are the pre-trained ones.
        batches: Whatever `loss_fn` takes, on its device. "faig" and "probe" iterate over them again for each pass:
            pass a list or a DataLoader. The others pass once, so that a generator will do. A shuffling loader gives
            each pass of the path the same batches, also with its own `generator`; draws in persistent workers differ.
        loss_fn: `loss_fn(model, batch)` gives a scalar tensor. It may use autocast, also `accelerator.autocast()`, or
            be called inside of it. Prefer bfloat16: in float16 small gradients vanish, because no loss is scaled.
        estimator: "faig", "probe", "gradient", "fisher" or "taylor" (see the top of this file).
        end_state: For "faig": parameters of the tuned network by name, as its `state_dict()` gives them; buffers in
            it are ignored.
        settings: FaigSettings or ProbeSettings, whichever belongs to the estimator; None takes its defaults.
        accelerator: Shares the batches out among its processes. Each of them passes the same sequence of all batches
            (a loader that is not prepared) and gets the same scores. The probe's tuning runs on each.
        progress: Whether to show a bar, on the main process.

    Raises:
        ValueError: The estimator is unknown, or settings or end weights do not belong to it; end weights are missing,
            unexpected, of another shape, not finite, or all equal to the start; there are no batches, or a generator
            where one does not do; the loss is not a scalar, not finite, or without gradient; the model has no
            adaptable layer, or none that the loss reaches; or another process failed (named).

    Warns:
        UserWarning: The loss never reaches some layers (named): their score is 0.
    """
    started = time.perf_counter()
    _check_estimator(estimator, end_state, settings)
    _check_model_and_batches(model, batches, estimator, accelerator)
    processes = Processes(accelerator)
    settings = settings or _DEFAULT_SETTINGS.get(estimator)
    progress = progress and processes.is_main
    end = None if end_state is None else checked_end_weights(model, end_state)
    with ExitStack() as unchanged:
        start = unchanged.enter_context(put_back_afterwards(model))
        seed = processes.from_main(torch.randint(2**31, ()).item())
        objective = MeanLoss(model, batches, loss_fn, seed, processes)
        unchanged.callback(objective.generators.reset)
        if estimator in ONE_PASS_ESTIMATORS:
            result = score_in_one_pass(objective, estimator, progress)
        else:
            if isinstance(settings, ProbeSettings):
                end = tuned_weights(objective, settings.num_steps, settings.learning_rate, progress)
                load_weights(model, start)
            result = integrate_path(objective, start, end, settings.num_path_steps, progress)
    if isinstance(settings, ProbeSettings):
        result = replace(
            result,
            method="probe",
            num_tuning_steps=settings.num_steps,
            tuning_learning_rate=settings.learning_rate,
        )
    result = replace(result, num_processes=processes.count, seconds=time.perf_counter() - started)
    # One process's for all: the last digits of a sum may depend on the kind of GPU, and ranks on them.
    result = processes.from_main(result)
    if result.unreached and processes.is_main:
        warnings.warn(
            f"The loss does not reach {len(result.unreached)} of {len(result.scores)} layers, whose score is 0: "
            f"{some([*map(repr, result.unreached)], 5)}. They get no rank unless one is guaranteed.",
            stacklevel=2,
        )
    return result


def _check_estimator(estimator: str, end_state: Any, settings: Any) -> None:
    if estimator not in ESTIMATORS:
        raise ValueError(f"The estimator is {estimator!r}: choose one of {', '.join(ESTIMATORS)}.")
    if (end_state is not None) != (estimator == "faig"):
        raise ValueError(
            "The estimator 'faig' needs end_state: pass the state_dict() of the same network after tuning, or choose "
            "'probe', which tunes by itself."
            if end_state is None
            else f"The estimator {estimator!r} takes no end_state: leave it out, or choose 'faig'."
        )
    wanted = type(_DEFAULT_SETTINGS.get(estimator))
    if settings is not None and type(settings) is not wanted:
        raise ValueError(
            f"The settings of the estimator {estimator!r} are {type(settings).__name__}: "
            f"{'it has none, leave them out' if wanted is type(None) else f'pass {wanted.__name__}'}."
        )


def _check_model_and_batches(
    model: nn.Module, batches: Iterable[Any], estimator: str, accelerator: Accelerator | None
) -> None:
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise ValueError(
            f"The model is a {type(model).__name__}, under which layers have other names and gradients are summed "
            "elsewhere: pass accelerator.unwrap_model(model), and the accelerator to share the batches out."
        )
    if not adaptable_layers(model):
        raise ValueError(no_adaptable_layer(model))
    if not isinstance(batches, Iterable):
        raise ValueError(f"The `batches` are a {type(batches).__name__}: pass a list or a DataLoader.")
    if isinstance(batches, Iterator) and estimator not in ONE_PASS_ESTIMATORS:
        raise ValueError(
            f"The `batches` are a {type(batches).__name__}, which cannot be iterated again for each pass: pass a list "
            "or a DataLoader."
        )
    if accelerator is not None and accelerator.num_processes > 1:
        if isinstance(batches, DataLoaderShard | DataLoaderDispatcher):
            raise ValueError(
                "The `batches` went through accelerator.prepare and are split among the processes already: pass the "
                "loader as it was before, of which each process takes its share."
            )
