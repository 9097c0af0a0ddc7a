"""Synthetic degradations of PROD (arXiv 2408.01099): blur, noise, rain, JPEG and motion blur.

Each is a frozen dataclass that keeps three things apart. Its *ranges* are the fields. `draw(generator)` picks
parameters within them, and `setting(strength, seed)` those of a given strength. `apply(image, **parameters)` is
deterministic: noise and rain carry the seed of their random field among the parameters. So the parameters that were
drawn are a recipe that can be stored as JSON and replayed.

Images are float32 RGB (3, H, W) in [0, 1], and stay in that range: each step ends as a camera would, clipped.
Our sources (the project page and its figures) name the five but do not say their ranges. All ranges here are our
choice, from barely visible to clearly worse than the photos our users bring; each field says why.

README.md in this folder shows how to add a degradation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import cv2
import numpy as np
import torch
from torch import Tensor

from .convolution import convolve, convolve_separably, to_image, to_planes
from .kernels import gaussian_kernel, gaussian_weights, motion_kernel
from .parameters import Parameters, Range, between, draw_seed, log_between, log_uniform, uniform
from .rain import Rain

# Looking a division up is faster than dividing.
_FROM_8_BITS = np.arange(256, dtype=np.float32) / 255


class Degradation(Protocol):
    """Interface of a degradation that takes part in PROD."""

    name: ClassVar[str]
    """One word for recipes, the contact sheet and model cards."""

    def draw(self, generator: torch.Generator) -> Parameters:
        """Draws parameters of `apply` within the ranges."""
        ...

    def setting(self, strength: float, seed: int) -> Parameters:
        """Returns parameters of `apply`, from the weakest (strength 0) to the strongest (1) of the ranges."""
        ...

    def apply(self, image: Tensor, **parameters: float | int | bool) -> Tensor:
        """Returns a degraded copy of an image."""
        ...


def default_degradations() -> tuple[Degradation, ...]:
    """Returns the degradations of PROD. Their order matters to the mode `fixed` alone, and is our choice."""
    return (
        GaussianBlur(),
        Noise(),
        Rain(),
        JPEG(),
        MotionBlur(),
    )


@dataclass(frozen=True)
class GaussianBlur:
    """Blurs by a Gaussian, round or stretched: defocus, resampling, and the uneven softness of lenses off their axis.

    sigma_px: standard deviation along each axis in pixels, both drawn. 0.3 does not show: the neighbours get 0.4%. At
        3 no detail below some 10 pixels is left, and what is can only be guessed.
    isotropic_probability: how often both axes share one sigma. Half: lenses do both, neither is the rule.
    """

    name: ClassVar[str] = "blur"
    sigma_px: Range = (0.3, 3.0)
    isotropic_probability: float = 0.5

    def draw(self, generator: torch.Generator) -> Parameters:
        sigma_x = uniform(self.sigma_px, generator)
        sigma_y = uniform(self.sigma_px, generator)
        angle = uniform((0.0, 180.0), generator)
        if uniform((0.0, 1.0), generator) < self.isotropic_probability:
            sigma_y, angle = sigma_x, 0.0
        return {"sigma_x_px": sigma_x, "sigma_y_px": sigma_y, "angle_deg": angle}

    def setting(self, strength: float, seed: int) -> Parameters:
        sigma = between(self.sigma_px, strength)
        return {"sigma_x_px": sigma, "sigma_y_px": sigma, "angle_deg": 0.0}

    def apply(self, image: Tensor, sigma_x_px: float, sigma_y_px: float, angle_deg: float) -> Tensor:
        """Convolves with a Gaussian whose first axis is turned by `angle_deg`; sigma 0 leaves that axis as it is."""
        if max(sigma_x_px, sigma_y_px) == 0:
            return image
        if sigma_x_px == sigma_y_px:  # round Gaussians alone are separable, and then far cheaper
            return to_image(convolve_separably(to_planes(image), gaussian_weights(sigma_x_px)))
        return to_image(convolve(to_planes(image), gaussian_kernel(sigma_x_px, sigma_y_px, angle_deg)))


@dataclass(frozen=True)
class Noise:
    """Sensor noise: Gaussian, signal-dependent and correlated between the colours, in calibrated proportions.

    The variance at intensity x is std^2 * ((1 - shot) + 2 * shot * x), before clipping: `shot` is the share that grows
    with the light as photon noise does, and std is met exactly at mid-grey whatever the share. The correlation
    coefficient between two colours is `correlation`, as demosaicing and colour matrices leave behind.

    std_255: standard deviation at mid-grey in 8-bit steps, drawn log-uniformly: real cameras are at the low end, where
        a step counts most. 1 is invisible, 50 the usual hardest setting of denoising papers.
    shot_share: from read noise alone (0, deep shadows) to photon noise alone (1, bright light).
    colour_correlation: 0 is three sensors of their own; above 0.8 the noise is grey to the eye already.
    """

    name: ClassVar[str] = "noise"
    std_255: Range = (1.0, 50.0)
    shot_share: Range = (0.0, 1.0)
    colour_correlation: Range = (0.0, 0.8)

    def draw(self, generator: torch.Generator) -> Parameters:
        return {
            "std_255": log_uniform(self.std_255, generator),
            "shot_share": uniform(self.shot_share, generator),
            "colour_correlation": uniform(self.colour_correlation, generator),
            "seed": draw_seed(generator),
        }

    def setting(self, strength: float, seed: int) -> Parameters:
        std_255 = log_between(self.std_255, strength)
        return {"std_255": std_255, "shot_share": 0.5, "colour_correlation": 0.4, "seed": seed}

    def apply(self, image: Tensor, std_255: float, shot_share: float, colour_correlation: float, seed: int) -> Tensor:
        """Adds the noise field of `seed`."""
        generator = torch.Generator().manual_seed(seed)
        fields = torch.randn((4, *image.shape[1:]), generator=generator)
        # Three fields of their own and one in common have unit variance and the wanted correlation by construction.
        common = fields[3].mul_(math.sqrt(colour_correlation))
        field = fields[:3].mul_(math.sqrt(1 - colour_correlation)).add_(common)
        std = (2 * shot_share * image).add_(1 - shot_share).sqrt_().mul_(std_255 / 255)
        return field.mul_(std).add_(image).clamp_(0, 1)


@dataclass(frozen=True)
class JPEG:
    """A real JPEG round trip (libjpeg through OpenCV), with or without chroma subsampling.

    quality: as libjpeg counts it. Below 10 hardly more than the mean of each block is left; 95 hardly shows.
    subsampling_probability: how often chroma is halved (4:2:0). It is what most cameras and sites do at most
        qualities, hence three in four.
    """

    name: ClassVar[str] = "jpeg"
    quality: tuple[int, int] = (10, 95)
    subsampling_probability: float = 0.75

    def draw(self, generator: torch.Generator) -> Parameters:
        low, high = self.quality
        return {
            "quality": int(torch.randint(low, high + 1, (), generator=generator)),
            "subsample_chroma": uniform((0.0, 1.0), generator) < self.subsampling_probability,
        }

    def setting(self, strength: float, seed: int) -> Parameters:
        low, high = self.quality
        return {"quality": round(between((high, low), strength)), "subsample_chroma": True}

    def apply(self, image: Tensor, quality: int, subsample_chroma: bool) -> Tensor:
        """Rounds to 8 bits, encodes at `quality` (1 to 100) and decodes."""
        sampling = cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420 if subsample_chroma else cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444
        options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling]
        red, green, blue = (cv2.convertScaleAbs(plane, alpha=255) for plane in to_planes(image))
        _, encoded = cv2.imencode(".jpg", cv2.merge([blue, green, red]), options)
        blue, green, red = cv2.split(cv2.imdecode(encoded, cv2.IMREAD_COLOR))
        return torch.from_numpy(np.stack([cv2.LUT(plane, _FROM_8_BITS) for plane in (red, green, blue)]))


@dataclass(frozen=True)
class MotionBlur:
    """Blurs along the path of a shaking camera or a moving subject.

    The path is a walk with inertia: each of its steps, half a pixel long, turns the heading by a normal angle of
    `shake_deg` / sqrt(steps), so that the heading at its end is normal around the first with a standard deviation of
    `shake_deg`.

    length_px: length of the path. 2 hardly shows; 25 is a strong hand shake at full resolution.
    shake_deg: 0 is a straight line, a subject that moves or a panned camera; at 90 one path in three turns by more
        than a right angle, as hands do over long exposures. The first heading (0 is to the right) may be any.
    """

    name: ClassVar[str] = "motion"
    length_px: Range = (2.0, 25.0)
    shake_deg: Range = (0.0, 90.0)

    def draw(self, generator: torch.Generator) -> Parameters:
        return {
            "length_px": uniform(self.length_px, generator),
            "angle_deg": uniform((0.0, 180.0), generator),
            "shake_deg": uniform(self.shake_deg, generator),
            "seed": draw_seed(generator),
        }

    def setting(self, strength: float, seed: int) -> Parameters:
        length, shake = between(self.length_px, strength), between(self.shake_deg, strength)
        return {"length_px": length, "angle_deg": 20.0, "shake_deg": shake, "seed": seed}

    def apply(self, image: Tensor, length_px: float, angle_deg: float, shake_deg: float, seed: int) -> Tensor:
        """Average the image along the path of `seed`; length 0 leaves it alone."""
        if length_px == 0:
            return image
        return to_image(convolve(to_planes(image), motion_kernel(length_px, angle_deg, shake_deg, seed)))
