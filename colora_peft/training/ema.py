"""The exponential moving average of the trained weights, which is what a run with `--use_ema` gives.

Average e and weights w after step t (counted from 1): e <- d e + (1 - d) w with d = min(decay, (1 + t) / (10 + t)).
The warm-up of d keeps the average of a short run from being its initial weights; it depends on the step alone, so that
a checkpoint needs the averages and nothing else. Buffers (running statistics) are not averaged: the last are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """Averages of the parameters of `model` that require gradients; the network itself stays as it is until asked.

    Args:
        model: The network that is trained; its parameters stay the same objects.
        decay: Weight of the past after the warm-up, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._parameters = trained
        self.averages: dict[str, Tensor] = {name: parameter.detach().clone() for name, parameter in trained.items()}

    def decay_at(self, step: int) -> float:
        """The decay after `step` optimiser steps, the first of which is 1."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Updates the averages with the weights after `step` optimiser steps."""
        weight = 1 - self.decay_at(step)
        for name, parameter in self._parameters.items():
            self.averages[name].lerp_(parameter, weight)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Overwrites the trained parameters with their averages."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self.averages[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context manager in which the network has the averages; afterwards it is bitwise as before."""
        weights = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self.copy_to_model()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.copy_(weights[name])
