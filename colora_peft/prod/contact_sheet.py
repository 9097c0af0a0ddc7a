"""An image of what PROD does to a photo: each degradation at weak, medium and strong, and some random recipes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from colora_peft.images import to_pil

from .degradations import JPEG, GaussianBlur, MotionBlur, Noise, Parameters, Rain, Range
from .random_order import RandomOrderDegradation, Recipe

STRENGTHS = {"weak": 0.1, "medium": 0.5, "strong": 0.9}
"""Shares of the draws of one parameter that are weaker."""

_COLUMNS = 1 + len(STRENGTHS)
_GAP_PIXELS, _LINE_PIXELS, _FONT_PIXELS = 8, 16, 13
_LINES = 2  # of a caption


def setting(name: str, strength: float, seed: int) -> Parameters:
    """Parameters of one default degradation at a place in its ranges; "stretched blur" is `blur` along one axis.

    Raises:
        ValueError: if there is no such degradation.
    """
    blur, rain, motion = GaussianBlur(), Rain(), MotionBlur()
    low, high = JPEG().quality
    sigma_px = _between(blur.sigma_px, strength)
    settings: dict[str, Parameters] = {
        "blur": {"sigma_x_px": sigma_px, "sigma_y_px": sigma_px, "angle_deg": 0.0},
        "stretched blur": {"sigma_x_px": sigma_px, "sigma_y_px": sigma_px / 4, "angle_deg": 30.0},
        "noise": {
            "std_255": _between_logarithms(Noise().std_255, strength),
            "shot_share": 0.5,
            "colour_correlation": 0.4,
            "seed": seed,
        },
        "rain": {
            "length_px": _between(rain.length_px, strength),
            "angle_deg": 15.0,
            "density": _between_logarithms(rain.density, strength),
            "opacity": _between(rain.opacity, strength),
            "brightness": 0.9,
            "focus_blur_px": _between(rain.focus_blur_px, 0.5),
            "layers": 1 + round(strength * (rain.layers - 1)),
            "seed": seed,
        },
        "jpeg": {"quality": round(_between((high, low), strength)), "subsample_chroma": True},
        "motion": {
            "length_px": _between(motion.length_px, strength),
            "angle_deg": 20.0,
            "shake_deg": _between(motion.shake_deg, strength),
            "seed": seed,
        },
    }
    if name not in settings:
        raise ValueError(f"There is no degradation {name!r}; choose one of {', '.join(settings)}.")
    return settings[name]


def _between(bounds: Range, share: float) -> float:
    return bounds[0] + share * (bounds[1] - bounds[0])


def _between_logarithms(bounds: Range, share: float) -> float:
    return math.exp(_between((math.log(bounds[0]), math.log(bounds[1])), share))


def draw_contact_sheet(clean: Tensor, recipes: Sequence[Recipe], seed: int = 0) -> Image.Image:
    """Draw the sheet: a row for each degradation with the clean image first, then the recipes, four in a row.

    Args:
        clean: (3, H, W) float in [0, 1]; about 256 x 256 pixels, which are shown one by one.
        recipes: what to draw below the single degradations, e.g. from `RandomOrderDegradation().draw`.
        seed: of noise, rain and motion paths.
    """
    degradation = RandomOrderDegradation()
    cells: list[tuple[Tensor, str]] = []
    for name in ("blur", "stretched blur", "noise", "rain", "jpeg", "motion"):
        cells.append((clean, f"{name}\nclean"))
        for label, strength in STRENGTHS.items():
            parameters = setting(name, strength, seed)
            recipe: Recipe = [{"degradation": name.split()[-1], **parameters}]
            cells.append((degradation.apply(clean, recipe), f"{label}\n{main_parameters(parameters)}"))
    cells += [(degradation.apply(clean, recipe), recipe_caption(recipe)) for recipe in recipes]
    return _drawn(cells)


def main_parameters(parameters: Parameters) -> str:
    """The one or two parameters that say how strong a setting is."""
    shown = {
        "sigma_x_px": "sigma {:.1f} px",
        "sigma_y_px": "{:.1f} px",
        "std_255": "std {:.0f} of 255",
        "length_px": "{:.0f} px",
        "density": "density {:.4f}",
        "quality": "quality {:.0f}",
        "shake_deg": "shake {:.0f} degrees",
    }
    return ", ".join(form.format(parameters[key]) for key, form in shown.items() if key in parameters)


def recipe_caption(recipe: Recipe) -> str:
    """The steps in order, on two lines where one is too short."""
    names = [str(step["degradation"]) for step in recipe] or ["nothing"]
    lines = [" > ".join(names[:3]), " > ".join(names[3:])]
    return lines[0] + (" >\n" + lines[1] if names[3:] else "")


def _drawn(cells: Sequence[tuple[Tensor, str]]) -> Image.Image:
    height, width = cells[0][0].shape[-2:]
    step_x, step_y = width + _GAP_PIXELS, height + _LINES * _LINE_PIXELS + _GAP_PIXELS
    rows = math.ceil(len(cells) / _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * step_x + _GAP_PIXELS, rows * step_y + _GAP_PIXELS), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_PIXELS)
    for place, (image, caption) in enumerate(cells):
        left = _GAP_PIXELS + place % _COLUMNS * step_x
        top = _GAP_PIXELS + place // _COLUMNS * step_y
        sheet.paste(to_pil(image), (left, top))
        for number, line in enumerate(caption.split("\n")):
            draw.text((left, top + height + number * _LINE_PIXELS), line, "black", font)
    return sheet
