"""PROD, pre-training with random order degradations."""

from .degradations import JPEG, Degradation, GaussianBlur, MotionBlur, Noise, Rain
from .random_order import Mode, RandomOrderDegradation, Recipe, default_degradations, light_degradations

__all__ = [
    "JPEG",
    "Degradation",
    "GaussianBlur",
    "Mode",
    "MotionBlur",
    "Noise",
    "Rain",
    "RandomOrderDegradation",
    "Recipe",
    "default_degradations",
    "light_degradations",
]
