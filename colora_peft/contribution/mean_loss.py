"""The mean loss over some batches as one fixed function of a network's weights, and the sums of its gradients.

Each batch begins with a seed of its own, in eval mode and with the buffers of the start, and each pass with the states
that a loader's own generators had then. So the function is the same at every weights, in any order of batches, and on
any number of processes, also where loss_fn sets the training mode. Not covered is what remembers earlier passes
elsewhere: the random states of a loader's persistent workers, and samplers that count epochs.

The processes split the batches: batch i is run by process i modulo their number, and all hold the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from colora_peft.utils import Processes

from .loader_generators import LoaderGenerators
from .weight_space import BufferCopies, moving_parameters, seed_rngs, sum_dtype

__all__ = ["GradientSums", "LossFn", "MeanLoss", "backward", "checked_loss", "no_batches_message"]

LossFn = Callable[[nn.Module, Any], Tensor]


@dataclass
class GradientSums:
    """Gradients of some parameters, summed over batches: memory for one number a weight, however many batches."""

    totals: dict[str, Tensor]
    """By parameter name."""
    squared: bool = False
    """Whether each batch's gradients are squared before they are added."""
    reached: set[str] = field(default_factory=set)
    """Parameters that had a gradient other than 0 in some batch."""

    @classmethod
    def zeros(cls, parameters: dict[str, Tensor], squared: bool = False) -> GradientSums:
        totals = {name: torch.zeros_like(value, dtype=sum_dtype(value)) for name, value in parameters.items()}
        return cls(totals, squared)

    @torch.no_grad()
    def take(self, parameters: dict[str, nn.Parameter]) -> None:
        """Add the parameters' gradients and empty them."""
        for name, parameter in parameters.items():
            gradient, parameter.grad = parameter.grad, None
            if gradient is None or name not in self.totals:
                continue
            if name not in self.reached and gradient.any():
                self.reached.add(name)
            if self.squared:
                gradient = gradient.to(self.totals[name])
                self.totals[name].addcmul_(gradient, gradient)
            else:
                self.totals[name].add_(gradient)

    def sum_over(self, processes: Processes) -> None:
        """Make the sums those of all processes, on every process."""
        names = list(self.totals)
        flags = torch.tensor([float(name in self.reached) for name in names])
        for name in names:
            self.totals[name] = processes.sum(self.totals[name])
        if names:
            flags = processes.sum(flags.to(self.totals[names[0]].device))
        self.reached = {name for name, flag in zip(names, flags.tolist(), strict=True) if flag}


@dataclass(frozen=True)
class MeanLoss:
    """L(weights) = mean over `batches` of loss_fn(model, batch), at the model's current weights."""

    model: nn.Module
    batches: Iterable[Any]
    loss_fn: LossFn
    seed: int
    processes: Processes
    buffers: BufferCopies = field(init=False)
    generators: LoaderGenerators = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "buffers", BufferCopies.of(self.model))
        object.__setattr__(self, "generators", LoaderGenerators.of(self.batches))

    def value(self, where: str) -> tuple[float, int]:
        """The mean loss over all processes' batches, and their number; no gradients."""
        loss_sum, num_batches = 0.0, 0
        with self.processes.failing_together(), torch.no_grad():
            for index, batch in self._batches_in_turn():
                num_batches = index + 1
                if self.processes.is_mine(index):
                    loss_sum += self._loss(batch, f"batch {index} {where}").item()
        return self._mean(loss_sum, num_batches)

    def add_gradients(self, sums: GradientSums, where: str, bar: tqdm | None = None) -> tuple[float, int]:
        """Add the gradients of this process's batches; the sum of their losses, and the number of all batches.

        Exchanges nothing, so an error is this process's alone.
        """
        parameters = moving_parameters(self.model)
        loss_sum, num_batches = 0.0, 0
        for index, batch in self._batches_in_turn():
            num_batches = index + 1
            if self.processes.is_mine(index):
                loss = self._loss(batch, f"batch {index} {where}")
                backward(loss, f"batch {index} {where}")
                sums.take(parameters)
                loss_sum += loss.item()
            if bar is not None:
                bar.update()
        return loss_sum, num_batches

    def mean_gradients(self, sums: GradientSums, where: str, bar: tqdm) -> tuple[float, int]:
        """Make `sums`, which are zero, the means over one pass, on every process; the mean loss and the number of
        batches."""
        with self.processes.failing_together():
            loss_sum, seen = self.add_gradients(sums, where, bar)
        loss, num_batches = self._mean(loss_sum, seen)
        sums.sum_over(self.processes)
        for total in sums.totals.values():
            total.div_(num_batches)
        return loss, num_batches

    def _mean(self, loss_sum: float, num_batches: int) -> tuple[float, int]:
        seen = self.processes.all_of(num_batches)
        if len(set(seen)) > 1:
            raise ValueError(
                f"The `batches` are {' and '.join(map(str, seen))} on the processes: give each of them the same "
                "sequence, which they share out by themselves (a loader that went through accelerator.prepare is "
                "split already)."
            )
        if not num_batches:
            raise ValueError(no_batches_message(self.batches))
        return self.processes.sum_of_numbers(loss_sum) / num_batches, num_batches

    def _batches_in_turn(self) -> Iterator[tuple[int, Any]]:
        """One pass over all batches, those of the other processes included; each begins with a seed of its own."""
        # Under the caller's autocast, low-precision copies of other weights may be cached.
        torch.clear_autocast_cache()
        self.generators.restore()
        seed_rngs(self.seed)
        batches = iter(self.batches)
        for index in count():
            # Before the batch is made, too: a loader may shuffle, and a data set augment.
            seed_rngs(self.seed + index)
            try:
                batch = next(batches)
            except StopIteration:
                return
            yield index, batch

    def _loss(self, batch: Any, where: str) -> Tensor:
        self.buffers.restore()
        self.model.eval()
        return checked_loss(self.loss_fn(self.model, batch), where)


def backward(loss: Tensor, where: str) -> None:
    """Gradients of a loss, into `.grad`.

    Raises:
        ValueError: it has none.
    """
    if not loss.requires_grad:
        raise ValueError(
            f"The loss for {where} has no gradient: loss_fn must compute it from the model's output without detach() "
            "or no_grad()."
        )
    loss.backward()


def checked_loss(loss: Any, where: str) -> Tensor:
    """The loss as a 0-dim tensor.

    Raises:
        ValueError: it is no scalar tensor, or not finite.
    """
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


def no_batches_message(batches: Iterable[Any]) -> str:
    if getattr(batches, "drop_last", False):
        return (
            "The `batches` are empty: the loader drops the last batch when that is not full, so lower its batch_size."
        )
    if isinstance(batches, Iterator):
        return "The `batches` are an empty iterator, perhaps one that was used up before: pass a list or a DataLoader."
    return "The `batches` are empty: pass at least one batch."
