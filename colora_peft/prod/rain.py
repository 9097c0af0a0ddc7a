"""Rain, the largest of the degradations; see `degradations.py` for what they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import cv2
import numpy as np
import torch
from torch import Tensor

from .convolution import convolve, to_image
from .kernels import disc_kernel, line_kernel
from .parameters import Parameters, Range, between, draw_seed, log_between, log_uniform, uniform


@dataclass(frozen=True)
class Rain:
    """Streaks of rain in depth layers, the near ones out of focus, veiling the image like thin bright glass.

    The camera is focused on the scene behind: a drop n times as far away has a streak 1/n as long, 1/n as opaque, and
    spread over a disc of 1/n the diameter. Spreading keeps the light of a streak, so wide streaks are faint ones.

    length_px, angle_deg (0 is vertical, positive from the upper left): 6 is drizzle at a short exposure, 30 a downpour
        in a small image; wind from either side. Beyond 40 degrees rain is a storm that nobody photographs.
    density: mean number of streaks of a layer for each pixel, drawn log-uniformly. At 0.001 a patch of
        64 x 64 has four, at 0.02 long streaks begin to close: what they hide can no longer be restored.
    opacity: how much of the background the strongest streak in focus hides. Below 0.2 it drowns in a photo's texture;
        water is never quite opaque.
    brightness: grey level of the water. A drop refracts a wide part of the sky, hence bright.
    focus_blur_px: diameter of the disc over which the lens spreads each point of the nearest layer. 1 is in focus; at
        4 a streak is a soft band.
    layers: 1 to this many. A fourth would be shorter than its own width.
    """

    name: ClassVar[str] = "rain"
    length_px: Range = (6.0, 30.0)
    angle_deg: Range = (-40.0, 40.0)
    density: Range = (0.001, 0.02)
    opacity: Range = (0.2, 0.9)
    brightness: Range = (0.7, 1.0)
    focus_blur_px: Range = (1.0, 4.0)
    layers: int = 3

    def draw(self, generator: torch.Generator) -> Parameters:
        return {
            "length_px": uniform(self.length_px, generator),
            "angle_deg": uniform(self.angle_deg, generator),
            "density": log_uniform(self.density, generator),
            "opacity": uniform(self.opacity, generator),
            "brightness": uniform(self.brightness, generator),
            "focus_blur_px": uniform(self.focus_blur_px, generator),
            "layers": 1 + int(torch.randint(self.layers, (), generator=generator)),
            "seed": draw_seed(generator),
        }

    def setting(self, strength: float, seed: int) -> Parameters:
        return {
            "length_px": between(self.length_px, strength),
            "angle_deg": 15.0,
            "density": log_between(self.density, strength),
            "opacity": between(self.opacity, strength),
            "brightness": 0.9,
            "focus_blur_px": between(self.focus_blur_px, 0.5),
            "layers": 1 + round(strength * (self.layers - 1)),
            "seed": seed,
        }

    def apply(
        self,
        image: Tensor,
        length_px: float,
        angle_deg: float,
        density: float,
        opacity: float,
        brightness: float,
        focus_blur_px: float,
        layers: int,
        seed: int,
    ) -> Tensor:
        """Blends towards `brightness` by the streak field of `seed`."""
        generator = torch.Generator().manual_seed(seed)
        veil = np.zeros((1, *image.shape[1:]), np.float32)
        for distance in range(1, layers + 1):
            streaks = rain_layer(veil.shape, length_px / distance, angle_deg, density, generator)
            veil += convolve(streaks, disc_kernel(focus_blur_px / distance) / distance, cv2.BORDER_WRAP)
        alpha = to_image(veil).mul_(opacity)
        return torch.lerp(image, torch.tensor(brightness), alpha).clamp_(0, 1)


def rain_layer(
    shape: tuple[int, ...], length_px: float, angle_deg: float, density: float, generator: torch.Generator
) -> np.ndarray:
    """Streaks of one depth in focus, (1, H, W) float32 in [0, 1]: random drops drawn out along the wind."""
    drops = np.zeros(shape, np.float32)
    # Drops fall independently of each other: their number is Poisson's. To draw them costs far less than to ask every
    # pixel for one.
    count = int(torch.poisson(torch.tensor(density * drops.size, dtype=torch.float64), generator=generator))
    places = torch.randint(drops.size, (count,), generator=generator).numpy()
    # Drops come in all sizes; one half as strong as the strongest still shows.
    drops.reshape(-1)[places] = torch.rand(count, generator=generator).mul_(0.5).add_(0.5).numpy()
    kernel = line_kernel(length_px, angle_deg)
    # The streaks of drops above the image reach into it: the periodic border supplies them.
    streaks = convolve(drops, kernel / kernel.max(), cv2.BORDER_WRAP)
    return np.clip(streaks, 0, 1, out=streaks)
