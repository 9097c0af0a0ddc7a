"""Input, restored image and target side by side, with their PSNR, in one file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from colora_peft.images import encode_sheet, paint_sheet, to_pil
from colora_peft.utils import write_bytes

from .metrics import psnr

_WIDEST_PX, _NARROWEST_PX = 400, 64
_MOST_BYTES = 1_400_000

Row = tuple[Tensor, Tensor, Tensor]


def save_before_after(rows: Sequence[Row], path: str | Path) -> None:
    """Writes input | restored | target of some images, with the PSNR of the first two, as one file below 1.5 MB.

    Args:
        rows: (input, restored, target), each (C, H, W) in [0, 1] with C 1 or 3. Sizes may differ between rows; all
            are shown in one width.
        path: The file, which ends in .png or .jpg.

    Raises:
        ValueError: There are no rows, the images of a row (numbered from 0) differ in size, or the file has another
            ending.
    """
    if not rows:
        raise ValueError("There is no image to show: `rows` is empty. Pass at least one.")
    captions = [_captions(number, row) for number, row in enumerate(rows)]
    width = min(_WIDEST_PX, max(target.shape[-1] for _, _, target in rows))
    # Photos compress to no size known beforehand: paint smaller until the file fits.
    while True:
        cells = [
            [(_resized(image, width), caption) for image, caption in zip(row, row_captions, strict=True)]
            for row, row_captions in zip(rows, captions, strict=True)
        ]
        content = encode_sheet(paint_sheet(cells), path)
        if len(content) <= _MOST_BYTES or width <= _NARROWEST_PX:
            break
        width = max(_NARROWEST_PX, int(width * min(0.95, math.sqrt(_MOST_BYTES / len(content)))))
    write_bytes(path, content)


def _captions(number: int, row: Row) -> tuple[str, str, str]:
    degraded, restored, target = row
    try:
        before, after = (psnr(image[None], target[None]).item() for image in (degraded, restored))
    except ValueError as error:
        raise ValueError(f"Row {number} of the before/after image does not fit. {error}") from error
    return f"input {before:.2f} dB", f"restored {after:.2f} dB ({after - before:+.2f})", "target"


def _resized(image: Tensor, width: int) -> Image.Image:
    shown = to_pil(image.expand(3, -1, -1))
    return shown.resize((width, max(1, round(width * shown.height / shown.width))), Image.Resampling.LANCZOS)
