"""Input, restored image and target side by side, with their PSNR, in one file."""

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from colora_peft.images import to_pil

from .metrics import psnr

__all__ = ["save_before_after"]


_CELL_WIDTH_PIXELS = 400


_GAP_PIXELS = 6


_CAPTION_PIXELS = 26


_PIXELS_PER_INCH = 100


_FILE_BYTES_MAX = 1_400_000


def save_before_after(rows: Sequence[tuple[Tensor, Tensor, Tensor]], path: str | os.PathLike[str]) -> None:
    """Save input | restored | target for some images, with the PSNR of the first two, as one image file below 1.5
    MB.

    Args:
        rows: (input, restored, target), each (C, H, W) float in [0, 1] with C 1 or 3; sizes may differ between rows.
        path: file to write; .png or .jpg.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no rows, or a row whose three images differ in size (numbered).
    """
    if not rows:
        raise ValueError("There is no image to show: `rows` is empty. Pass at least one.")
    captions = []
    for number, (degraded, restored, target) in enumerate(rows):
        try:
            before, after = (psnr(image[None], target[None]).item() for image in (degraded, restored))
        except ValueError as error:
            raise ValueError(f"Row {number} of the before/after image does not fit. {error}") from error
        captions.append((f"{before:.2f} dB", f"{after:.2f} dB  ({after - before:+.2f})", ""))
    path = Path(path)
    file_format = path.suffix.lstrip(".").lower() or "png"
    cell_width = min(_CELL_WIDTH_PIXELS, max(target.shape[-1] for _, _, target in rows))
    # Photos compress to no size known beforehand: draw smaller until the file fits.
    while True:
        content = _drawn_rows(rows, captions, cell_width, file_format)
        if len(content) <= _FILE_BYTES_MAX or cell_width <= 64:
            break
        cell_width = max(64, int(cell_width * min(0.95, math.sqrt(_FILE_BYTES_MAX / len(content)))))
    path.write_bytes(content)


def _drawn_rows(
    rows: Sequence[tuple[Tensor, Tensor, Tensor]],
    captions: Sequence[tuple[str, str, str]],
    cell_width: int,
    file_format: str,
) -> bytes:
    """The image file; every image is resized to whole pixels first, so that none is resampled twice."""
    heights = [max(1, round(cell_width * target.shape[-2] / target.shape[-1])) for _, _, target in rows]
    width = 3 * cell_width + 4 * _GAP_PIXELS
    height = _CAPTION_PIXELS + sum(heights) + len(rows) * _CAPTION_PIXELS
    inches = (width / _PIXELS_PER_INCH, height / _PIXELS_PER_INCH)
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, dpi=_PIXELS_PER_INCH, facecolor="white")
    lefts = [_GAP_PIXELS + column * (cell_width + _GAP_PIXELS) for column in range(3)]

    def write(text: str, left: int, top: int, **style: Any) -> None:
        x, y = (left + cell_width / 2) / width, 1 - (top + _CAPTION_PIXELS / 2) / height
        figure.text(x, y, text, ha="center", va="center", **style)

    for left, title in zip(lefts, ("input", "restored", "target"), strict=True):
        write(title, left, 0, fontsize=11, fontweight="bold")
    top = _CAPTION_PIXELS
    for row, row_captions, row_height in zip(rows, captions, heights, strict=True):
        for left, image, caption in zip(lefts, row, row_captions, strict=True):
            box = (left / width, 1 - (top + row_height) / height, cell_width / width, row_height / height)
            axes = figure.add_axes(box)
            axes.imshow(_pixels(image, cell_width, row_height), interpolation="none", aspect="auto")
            axes.set_axis_off()
            write(caption, left, top + row_height, fontsize=10)
        top += row_height + _CAPTION_PIXELS
    buffer = io.BytesIO()
    figure.savefig(buffer, format=file_format, dpi=_PIXELS_PER_INCH)
    return buffer.getvalue()


def _pixels(image: Tensor, width: int, height: int) -> np.ndarray:
    """(C, H, W) in [0, 1] to (height, width, 3) uint8."""
    drawn = to_pil(image.expand(3, -1, -1))
    return np.asarray(drawn.resize((width, height), Image.Resampling.LANCZOS))
