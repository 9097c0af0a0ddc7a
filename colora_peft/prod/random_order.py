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

from .degradations import JPEG, Degradation, GaussianBlur, MotionBlur, Noise, Parameters, Rain

Mode = Literal["prod", "single", "fixed"]
# The steps that were drawn for one image, in order: {"degradation": name, **parameters}. Plain JSON.
Recipe = list[dict[str, str | float | int | bool]]


def default_degradations() -> tuple[Degradation, ...]:
    """The five of PROD. Their order matters to the mode `fixed` alone, and is our choice."""
    return (GaussianBlur(), Noise(), Rain(), JPEG(), MotionBlur())


@dataclass(frozen=True)
class RandomOrderDegradation:
    """Draws recipes and applies them.

    degradations: the pool.
    mode: "prod" a random subset in random order; "single" one at a time; "fixed" all of them, always in the pool's
        order. The last two are PROD's comparisons as we read them from a figure of the project page.
    """

    degradations: Sequence[Degradation] = default_degradations()
    mode: Mode = "prod"

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"The mode must be one of {', '.join(get_args(Mode))}, got {self.mode!r}.")
        names = [degradation.name for degradation in self.degradations]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"The degradations must be one or more with different names, got {names}.")

    def draw(self, generator: torch.Generator) -> Recipe:
        """Choose which degradations, in which order, with which parameters."""
        return [_step(self.degradations[i], generator) for i in self._draw_order(generator)]

    def _draw_order(self, generator: torch.Generator) -> list[int]:
        count = len(self.degradations)
        if self.mode == "fixed":
            return list(range(count))
        if self.mode == "single":
            return [int(torch.randint(count, (), generator=generator))]
        chosen = torch.rand(count, generator=generator) < 0.5
        return [i for i in torch.randperm(count, generator=generator).tolist() if chosen[i]]

    def apply(self, image: Tensor, recipe: Recipe) -> Tensor:
        """Apply (or replay) a recipe to a (3, H, W) image in [0, 1].

        Raises:
            ValueError: if the recipe names a degradation that is not in the pool.
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


def _step(degradation: Degradation, generator: torch.Generator) -> dict[str, str | float | int | bool]:
    parameters: Parameters = degradation.draw(generator)
    return {"degradation": degradation.name, **parameters}
