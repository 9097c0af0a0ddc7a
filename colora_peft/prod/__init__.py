"""PROD: pre-training with random order degradations.

`RandomOrderDegradation` applies a random subset of synthetic degradations to a clean image, in random order. The
degradations stand in `degradations.py`; README.md in this folder shows how to add one. `python -m colora_peft.prod`
draws a contact sheet of them.
"""

from .degradations import JPEG, Degradation, GaussianBlur, MotionBlur, Noise, default_degradations
from .parameters import Parameters, uniform
from .rain import Rain
from .random_order import Mode, RandomOrderDegradation, Recipe, light_degradations

__all__ = [
    "JPEG",
    "Degradation",
    "GaussianBlur",
    "Mode",
    "MotionBlur",
    "Noise",
    "Parameters",
    "Rain",
    "RandomOrderDegradation",
    "Recipe",
    "default_degradations",
    "light_degradations",
    "uniform",
]
