"""The five transforms of Albumentations that are nearest to PROD, at PROD's ranges.

They differ from PROD. The library's motion paths and streaks of rain are straight, and its rain has one depth. Its
sensor noise is signal-dependent and coloured but not calibrated. It works on 8 bits after each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from colora_peft.prod import JPEG, GaussianBlur, MotionBlur, Noise, Rain

Transform = Callable[[np.ndarray], np.ndarray]


def library_transforms(plain_noise: bool) -> dict[str, Transform]:
    """The transforms by PROD's names: functions of (H, W, 3) uint8 that draw their parameters at each call.

    Args:
        plain_noise: Whether to take a cheaper noise, which is neither signal-dependent nor coloured.

    Raises:
        ImportError: Albumentations is missing or has another major version than 2.
    """
    try:
        import albumentations
    except ImportError as error:
        raise ImportError(
            'The comparison needs Albumentations: run `pip install "albumentations>=2,<3"`, or pass --library none.'
        ) from error
    if int(albumentations.__version__.split(".")[0]) != 2:
        raise ImportError(
            f"The comparison is written for Albumentations 2, this is {albumentations.__version__}: run "
            '`pip install "albumentations>=2,<3"`, or pass --library none.'
        )
    stds = tuple(std_255 / 255 for std_255 in Noise().std_255)
    rain = Rain()
    noise = (
        albumentations.GaussNoise(std_range=stds, per_channel=True, p=1)
        if plain_noise
        else albumentations.ISONoise(intensity=(0.1, 1.0), p=1)
    )
    transforms = {
        # A generalised Gaussian of beta 1 is a Gaussian.
        "blur": albumentations.AdvancedBlur(
            blur_limit=(3, 2 * math.ceil(3 * GaussianBlur().sigma_px[1]) + 1),
            sigma_x_limit=GaussianBlur().sigma_px,
            sigma_y_limit=GaussianBlur().sigma_px,
            beta_limit=(0.99, 1.01),
            noise_limit=(0.99, 1.01),
            p=1,
        ),
        "noise": noise,
        "rain": albumentations.RandomRain(
            slant_range=(-20, 20), drop_length=round(sum(rain.length_px) / 2), brightness_coefficient=1.0, p=1
        ),
        "jpeg": albumentations.ImageCompression(quality_range=JPEG().quality, p=1),
        "motion": albumentations.MotionBlur(blur_limit=(3, math.ceil(MotionBlur().length_px[1])), p=1),
    }
    return {name: _called(albumentations.Compose([transform], seed=0)) for name, transform in transforms.items()}


def _called(pipeline: Callable[..., dict[str, np.ndarray]]) -> Transform:
    return lambda pixels: pipeline(image=pixels)["image"]


def to_network(pixels: np.ndarray) -> Tensor:
    """Converts (H, W, 3) uint8 to (3, H, W) float32 in [0, 1], as PROD returns it."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float().div_(255)
