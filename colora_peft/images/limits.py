"""Largest size of an image, in place of Pillow's limit, which is one for the whole process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from colora_peft.utils import SharedSettings

# More than the 151 million of the largest cameras and the 199.8 million of phones; 2.4 GB as float32 RGB.
DEFAULT_MAX_PIXELS = 200_000_000


def check_pixels(opened: Image.Image, max_pixels: int, remedy: str) -> None:
    """Refuses an image before it is decoded.

    Raises:
        ValueError: It has more pixels; the remedy ends the message.
    """
    width, height = opened.size
    if width * height > max_pixels:
        raise ValueError(f"{width} x {height} pixels are more than the limit of {max_pixels:,}{remedy}")


@contextmanager
def _no_limit() -> Iterator[None]:
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


without_pillow_s_limit = SharedSettings(_no_limit)
"""Context in which Pillow, which refuses from 179 million pixels on, opens images of any size."""
