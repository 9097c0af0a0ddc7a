"""Parameters of a degradation: what they are, and how they are drawn or set within their ranges."""

from __future__ import annotations

import math

import torch

Range = tuple[float, float]
Parameters = dict[str, float | int | bool]


def between(bounds: Range, share: float) -> float:
    """Returns the number at a share of the way from the first bound to the second."""
    return bounds[0] + share * (bounds[1] - bounds[0])


def log_between(bounds: Range, share: float) -> float:
    """Returns the number whose logarithm is at a share of the way between those of the bounds."""
    return math.exp(between((math.log(bounds[0]), math.log(bounds[1])), share))


def uniform(bounds: Range, generator: torch.Generator) -> float:
    """Draws a number, uniform in `bounds`."""
    return between(bounds, _share(generator))


def log_uniform(bounds: Range, generator: torch.Generator) -> float:
    """Draws a number whose logarithm is uniform in that of `bounds`: as many weak draws as strong ones."""
    return log_between(bounds, _share(generator))


def draw_seed(generator: torch.Generator) -> int:
    """Draws the seed of a random field, such as noise."""
    return int(torch.randint(2**31, (), generator=generator))


def _share(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator, dtype=torch.float64))
