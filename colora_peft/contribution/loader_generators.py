"""The generators that a DataLoader draws its order from, where it was given its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["LoaderGenerators"]


@dataclass(frozen=True)
class LoaderGenerators:
    """The generators of a loader and of its samplers with their states at some moment; none for a list.

    What keeps count of its passes in another way is not covered: workers that persist, and samplers with epochs.
    """

    states: list[tuple[torch.Generator, Tensor]]

    @classmethod
    def of(cls, batches: Iterable[Any]) -> LoaderGenerators:
        batch_sampler = getattr(batches, "batch_sampler", None)
        holders = (batches, getattr(batches, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
        found = (getattr(holder, "generator", None) for holder in holders)
        generators = {id(generator): generator for generator in found if isinstance(generator, torch.Generator)}
        return cls([(generator, generator.get_state()) for generator in generators.values()])

    def restore(self) -> None:
        for generator, state in self.states:
            generator.set_state(state)
