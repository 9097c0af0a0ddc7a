"""Contact sheet of PROD: each degradation at weak, medium and strong, and some random recipes."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from colora_peft.images import paint_sheet, to_pil

from .degradations import Degradation
from .parameters import Parameters
from .random_order import RandomOrderDegradation, Recipe

STRENGTHS = {"weak": 0.1, "medium": 0.5, "strong": 0.9}
"""Shares of the draws of one parameter that are weaker."""

_COLUMNS = 1 + len(STRENGTHS)


def draw_contact_sheet(
    clean: Tensor, recipes: Sequence[Recipe], pool: RandomOrderDegradation | None = None, seed: int = 0
) -> Image.Image:
    """Draws the sheet: a row for each degradation with the clean image first, then the recipes, four in a row.

    Args:
        clean: Clean image (3, H, W) in [0, 1] of about 256 x 256 pixels, which are shown one by one.
        recipes: Recipes to draw below the single degradations, e.g. from `RandomOrderDegradation().draw`.
        pool: The degradations; default: those of PROD.
        seed: Seed of random fields, such as noise.
    """
    pool = pool or RandomOrderDegradation()
    rows = [_row(degradation, clean, seed) for degradation in pool.degradations]
    cells = [(to_pil(pool.apply(clean, recipe)), recipe_caption(recipe)) for recipe in recipes]
    rows += [cells[first : first + _COLUMNS] for first in range(0, len(cells), _COLUMNS)]
    return paint_sheet(rows)


def _row(degradation: Degradation, clean: Tensor, seed: int) -> list[tuple[Image.Image, str]]:
    settings = {label: degradation.setting(strength, seed) for label, strength in STRENGTHS.items()}
    row = [(to_pil(clean), f"{degradation.name}: clean")]
    for label, parameters in settings.items():
        caption = f"{label}: {_differing(parameters, list(settings.values()))}"
        row.append((to_pil(degradation.apply(clean, **parameters)), caption))
    return row


def _differing(parameters: Parameters, settings: Sequence[Parameters]) -> str:
    """Returns the parameters that say how strong a setting is: those in which the settings differ."""
    shown = (key for key in parameters if len({setting[key] for setting in settings}) > 1)
    return ", ".join(f"{key}={parameters[key]:.3g}" for key in shown)


def recipe_caption(recipe: Recipe) -> str:
    """Returns the names of the steps in order."""
    return " > ".join(str(step["degradation"]) for step in recipe) or "nothing"
