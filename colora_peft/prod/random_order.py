"""PROD: pre-training with random order degradations (arXiv 2408.01099), and its two ablations.

From a clean image a random subset of the degradations is applied in random order. Our sources (the project page and
its figures) do not say how subsets are drawn; here each degradation takes part with probability 1/2, so all subsets
are equally likely, the empty one (learn to leave a good image alone) included.

That is one image in 32, and few others are nearly clean: a network trained so alters images that it should leave
alone. `untouched_share` and `light_share` set aside more of both. They are our addition and off by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .degradations import JPEG, Degradation, GaussianBlur, MotionBlur, Noise, default_degradations
from .parameters import Parameters, uniform
from .rain import Rain

Mode = Literal["prod", "single", "fixed"]
Step = dict[str, str | float | int | bool]
"""{"degradation": name, **parameters}, plain JSON."""
Recipe = list[Step]
"""Steps that were drawn for one image, in order."""


def light_degradations() -> tuple[Degradation, ...]:
    """Returns the five of PROD at the weak end of their ranges, as a good camera leaves them. Ranges: our choice."""
    return (
        GaussianBlur(sigma_px=(0.2, 0.8)),
        Noise(std_255=(0.5, 8.0)),
        Rain(density=(0.0005, 0.002), opacity=(0.1, 0.4)),
        JPEG(quality=(75, 98)),
        MotionBlur(length_px=(1.5, 4.0)),
    )


@dataclass(frozen=True)
class RandomOrderDegradation:
    """Random recipes of degradations.

    degradations: The pool.
    mode: "prod", a random subset in random order; "single", one at a time; "fixed", all of them, always in the pool's
        order. The last two are PROD's comparisons as we read them from a figure of the project page.
    untouched_share: Share of the images that are left alone, besides those for which no degradation is drawn.
    light_share: Share of the images whose degradations are drawn from `light`.
    light: Weak degradations with names from the pool, in its order.
    """

    degradations: Sequence[Degradation] = default_degradations()
    mode: Mode = "prod"
    untouched_share: float = 0.0
    light_share: float = 0.0
    light: Sequence[Degradation] = light_degradations()

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"The mode must be one of {', '.join(get_args(Mode))}, got {self.mode!r}.")
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"The degradations must be one or more with different names, got {self.names}.")
        if not (self.untouched_share >= 0 and self.light_share >= 0 and self.untouched_share + self.light_share <= 1):
            raise ValueError(
                "The untouched and the light share must not be negative and together at most 1, got "
                f"{self.untouched_share} and {self.light_share}."
            )
        unknown = sorted({degradation.name for degradation in self.light} - {*self.names})
        if self.light_share and unknown:
            raise ValueError(
                f"The light degradations {unknown} are not among the degradations, which are {self.names}."
            )

    @property
    def names(self) -> list[str]:
        """Names of the degradations in the pool, in its order."""
        return [degradation.name for degradation in self.degradations]

    def draw(self, generator: torch.Generator) -> Recipe:
        """Draws which degradations are applied, in which order and with which parameters."""
        pool = self._draw_pool(generator)
        chosen = (pool[i] for i in self._draw_order(len(pool), generator))
        return [step_of(degradation, degradation.draw(generator)) for degradation in chosen]

    def _draw_pool(self, generator: torch.Generator) -> Sequence[Degradation]:
        if not self.untouched_share and not self.light_share:  # no draw: the images are those of earlier releases
            return self.degradations
        place = uniform((0.0, 1.0), generator)
        if place < self.untouched_share:
            return ()
        return self.light if place < self.untouched_share + self.light_share else self.degradations

    def _draw_order(self, count: int, generator: torch.Generator) -> list[int]:
        if count == 0:
            return []
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
