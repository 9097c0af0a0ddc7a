"""Images side by side in one file, with a word above each. (With figures and a fixed layout: figures.py.)"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from colora_peft.utils import write_bytes

from .reading import to_pil

__all__ = ["save_comparison"]

_LONGEST_SIDE_PX = 1600
_NARROWEST_COLUMN_PX = 140
_GAP_PX = 8
_FONT_PX = 16
_CAPTION_PX = 28


def save_comparison(
    images: Sequence[Tensor], captions: Sequence[str], path: str | os.PathLike[str], icc_profile: bytes | None = None
) -> None:
    """Write images of one size side by side as a JPEG, each at most 1600 pixels wide and high.

    Args:
        images: Each (3, H, W) float in [0, 1].
        captions: What stands above each; cut where it would run into the next.
        path: The file; the folders above it are made.
        icc_profile: Describes the values of all images.
    """
    height, width = images[0].shape[-2:]
    scale = min(1.0, _LONGEST_SIDE_PX / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    font = ImageFont.load_default(_FONT_PX)
    column = max(size[0], _NARROWEST_COLUMN_PX)  # or there would be no room for the caption
    sheet = Image.new("RGB", (len(images) * (column + _GAP_PX) + _GAP_PX, _CAPTION_PX + size[1] + _GAP_PX), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left = _GAP_PX + number * (column + _GAP_PX)
        while font.getlength(caption) > column:
            caption = caption.removesuffix("…")[:-1] + "…"
        draw.text((left, _CAPTION_PX / 2), caption, fill="black", font=font, anchor="lm")
        drawn = to_pil(image)
        drawn = drawn if scale == 1 else drawn.resize(size, Image.Resampling.LANCZOS)
        sheet.paste(drawn, (left, _CAPTION_PX))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=92, subsampling=0, icc_profile=icc_profile)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    write_bytes(path, buffer.getvalue())
