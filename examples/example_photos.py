"""Photos to try the adapters on, from the shipped underwater pairs.

They are test photos, which no shipped adapter was trained on. Photos of real rain are not ours to pass on, so one is
made of a clean photo: heavy streaks of two directions that add their light, as in Rain100H, by which the rain adapter
was trained. (The rain of PROD veils instead, and the network undoes that without an adapter.) There is none of noise:
the noise adapter knows real cameras, whose noise we could but imitate.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from colora_peft.images import read_image, to_pil
from colora_peft.prod.rain import rain_layer

UNDERWATER = ("76.jpg", "66.jpg", "89.jpg")
CLEAN = "58.jpg"

RAIN_LAYERS = ((30.0, 12.0, 0.012, 0.8), (22.0, -4.0, 0.010, 0.6))
"""(length in pixels, angle in degrees, streaks a pixel, light they add) of each."""


@dataclass(frozen=True)
class ExamplePhoto:
    """A degraded photo, its clean version, (3, H, W) in [0, 1], and the adapter that is for it."""

    name: str
    adapter: str
    degraded: Tensor
    clean: Tensor


def example_photos(data_dir: str | Path) -> list[ExamplePhoto]:
    """Three underwater photos and one with rain.

    Args:
        data_dir: The folder `examples/data`.

    Raises:
        ValueError: A photo is missing.
    """
    inputs, targets = (Path(data_dir) / "underwater" / "test" / side for side in ("input", "target"))
    photos = [
        ExamplePhoto(
            f"underwater-{Path(name).stem}", "underwater", read_image(inputs / name), read_image(targets / name)
        )
        for name in UNDERWATER
    ]
    clean = read_image(targets / CLEAN)
    return [*photos, ExamplePhoto("rain", "rain", add_rain(clean), clean)]


def add_rain(clean: Tensor) -> Tensor:
    """(3, H, W) in [0, 1] with the light of `RAIN_LAYERS` added; the same for every call."""
    generator = torch.Generator().manual_seed(0)
    rainy = clean.clone()
    for length_px, angle_deg, density, light in RAIN_LAYERS:
        streaks = rain_layer((1, *clean.shape[1:]), length_px, angle_deg, density, generator)
        rainy += light * torch.from_numpy(streaks)
    return rainy.clamp_(0, 1)


def write_examples(photos: list[ExamplePhoto], folder: str | Path) -> list[tuple[Path, str]]:
    """Write the degraded photos as PNG; (file, adapter that is for it) of each."""
    written = []
    for photo in photos:
        path = Path(folder) / f"{photo.name}.png"
        to_pil(photo.degraded).save(path)
        written.append((path, photo.adapter))
    return written
