"""PROD: pre-training with random order degradations (arXiv 2408.01099), and its two ablations.

From a clean image a random subset of the degradations is applied in random order. Our sources (the project page and
its figures) do not say how subsets are drawn; here each degradation takes part with probability 1/2, so all subsets
are equally likely, the empty one (learn to leave a good image alone) included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .degradations import Degradation, default_degradations
from .parameters import Parameters

Mode = Literal["prod", "single", "fixed"]
Step = dict[str, str | float | int | bool]
"""{"degradation": name, **parameters}, plain JSON."""
Recipe = list[Step]
"""Steps that were drawn for one image, in order."""


@dataclass(frozen=True)
class RandomOrderDegradation:
    """Random recipes of degradations.

    degradations: The pool.
    mode: "prod", a random subset in random order; "single", one at a time; "fixed", all of them, always in the pool's
        order. The last two are PROD's comparisons as we read them from a figure of the project page.
    """

    degradations: Sequence[Degradation] = default_degradations()
    mode: Mode = "prod"

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"The mode must be one of {', '.join(get_args(Mode))}, got {self.mode!r}.")
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"The degradations must be one or more with different names, got {self.names}.")

    @property
    def names(self) -> list[str]:
        """Names of the degradations in the pool, in its order."""
        return [degradation.name for degradation in self.degradations]

    def draw(self, generator: torch.Generator) -> Recipe:
        """Draws which degradations are applied, in which order and with which parameters."""
        chosen = (self.degradations[i] for i in self._draw_order(generator))
        return [step_of(degradation, degradation.draw(generator)) for degradation in chosen]

    def _draw_order(self, generator: torch.Generator) -> list[int]:
        count = len(self.degradations)
        if self.mode == "fixed":
            return list(range(count))
        if self.mode == "single":
            return [int(torch.randint(count, (), generator=generator))]
        chosen = torch.rand(count, generator=generator) < 0.5
        return [i for i in torch.randperm(count, generator=generator).tolist() if chosen[i]]

    def apply(self, image: Tensor, recipe: Recipe) -> Tensor:
        """Applies a recipe to an image (3, H, W) in [0, 1].

        Raises:
            ValueError: The recipe names a degradation that is not in the pool.
        """
        by_name = {degradation.name: degradation for degradation in self.degradations}
        for step in recipe:
            name = step.get("degradation")
            if name not in by_name:
                raise ValueError(
                    f"The recipe asks for {name!r}, but the degradations here are {sorted(by_name)}; add it to them."
                )
            image = by_name[name].apply(image, **{key: value for key, value in step.items() if key != "degradation"})
        return image


def step_of(degradation: Degradation, parameters: Parameters) -> Step:
    """Returns the step of a recipe that applies a degradation with these parameters."""
    return {"degradation": degradation.name, **parameters}
