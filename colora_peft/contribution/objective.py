"""The objective of an estimate: the mean loss over some batches, and the sums of its gradients.

The mean loss is one fixed function of a network's weights. Each batch begins with a seed of its own, in eval mode and
with the buffers of the start. Each pass begins with the states that a loader's own generators had at the start. So the
function is the same at any weights, in any order of batches and on any number of processes. It is also the same where
loss_fn sets the training mode. Two things that remember earlier passes are not covered: the random states of a
loader's persistent workers, and samplers that count epochs.

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

from .weight_space import BufferCopies, moving_parameters, seed_rngs, sum_dtype

LossFn = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class LoaderGenerators:
    """The generators that a DataLoader and its samplers were given, with their states at some moment."""

    states: list[tuple[torch.Generator, Tensor]]

    @classmethod
    def of(cls, batches: Iterable[Any]) -> LoaderGenerators:
        """Returns those of `batches`; none for a list."""
        batch_sampler = getattr(batches, "batch_sampler", None)
        holders = (batches, getattr(batches, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
        found = (getattr(holder, "generator", None) for holder in holders)
        generators = {id(generator): generator for generator in found if isinstance(generator, torch.Generator)}
        return cls([(generator, generator.get_state()) for generator in generators.values()])

    def reset(self) -> None:
        """Puts the states back."""
        for generator, state in self.states:
            generator.set_state(state)


@dataclass
class GradientSums:
    """Gradients of some parameters, summed over batches: memory for one number a weight, however many batches."""

    totals: dict[str, Tensor]
    """By parameter name."""
    squared: bool = False
    """Whether the gradients of each batch are squared before they are added."""
    reached: set[str] = field(default_factory=set)
    """Parameters that had a gradient other than 0 in some batch."""

    @classmethod
    def zeros(cls, parameters: dict[str, Tensor], squared: bool = False) -> GradientSums:
        totals = {name: torch.zeros_like(value, dtype=sum_dtype(value)) for name, value in parameters.items()}
        return cls(totals, squared)

    @torch.no_grad()
    def take(self, parameters: dict[str, nn.Parameter]) -> None:
        """Adds the gradients of the parameters and empties them."""
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
        """Makes the sums those of all processes, on every process."""
        names = list(self.totals)
        flags = torch.tensor([float(name in self.reached) for name in names])
        for name in names:
            self.totals[name] = processes.sum(self.totals[name])
        flags = processes.sum(flags.to(self.totals[names[0]].device))
        self.reached = {name for name, flag in zip(names, flags.tolist(), strict=True) if flag}


@dataclass(frozen=True)
class MeanLoss:
    """The function L(weights) = mean over `batches` of loss_fn(model, batch), at the model's current weights."""

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
        """Returns the mean loss over all processes' batches and their number, without gradients."""
        with self.processes.failing_together(), torch.no_grad():
            loss_sum, num_batches = self.add_gradients(None, where)
        return self._mean(loss_sum, num_batches)

    def add_gradients(self, sums: GradientSums | None, where: str, bar: tqdm | None = None) -> tuple[float, int]:
        """Runs this process's batches and adds their gradients to `sums`, if there are any.

        It exchanges nothing, so an error is this process's alone.

        Returns:
            The sum of this process's losses, and the number of all batches.
        """
        parameters = moving_parameters(self.model)
        loss_sum, num_batches = 0.0, 0
        for index, batch in self._batches_in_turn():
            num_batches = index + 1
            if self.processes.is_mine(index):
                self.buffers.reset()
                self.model.eval()
                here = f"batch {index} {where}"
                loss = checked_loss(self.loss_fn(self.model, batch), here)
                if sums is not None:
                    backward(loss, here)
                    sums.take(parameters)
                loss_sum += loss.item()
            if bar is not None:
                bar.update()
        return loss_sum, num_batches

    def mean_gradients(self, sums: GradientSums, where: str, bar: tqdm) -> tuple[float, int]:
        """Turns `sums` of zero into means over one pass, the same on every process.

        Returns:
            The mean loss, and the number of all batches.
        """
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
        """Yields all batches with their index, those of the other processes included, each after a seed of its own."""
        # Under the caller's autocast, low-precision copies of other weights may be cached.
        torch.clear_autocast_cache()
        self.generators.reset()
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


def backward(loss: Tensor, where: str) -> None:
    """Writes the gradients of a loss, which must have some, into `.grad`."""
    if not loss.requires_grad:
        raise ValueError(
            f"The loss for {where} has no gradient: loss_fn must compute it from the model's output without detach() "
            "or no_grad()."
        )
    loss.backward()


def checked_loss(loss: Any, where: str) -> Tensor:
    """Returns the loss as a 0-dim tensor; it must be a finite scalar."""
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
    """Returns why there are no batches, and the remedy."""
    if getattr(batches, "drop_last", False):
        return (
            "The `batches` are empty: the loader drops the last batch when that is not full, so lower its batch_size."
        )
    if isinstance(batches, Iterator):
        return "The `batches` are an empty iterator, perhaps one that was used up before: pass a list or a DataLoader."
    return "The `batches` are empty: pass at least one batch."
