"""Sheets: images in rows, each under its caption, painted by Pillow into one image."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from colora_peft.utils import write_bytes

from .reading import to_pil

Cell = tuple[Image.Image, str]

_GAP_PX = 8
_NARROWEST_COLUMN_PX = 140  # room for a caption
_FONT_PX, _LINE_PX, _MOST_LINES = 16, 20, 3
_LONGEST_SIDE_PX = 1600


def paint_sheet(rows: Sequence[Sequence[Cell]]) -> Image.Image:
    """Paints rows of images with captions above them, on white and in columns of one width.

    Args:
        rows: Images in the size that they are shown in, with captions. A caption takes up to three lines; what is
            longer is cut.
    """
    font = ImageFont.load_default(_FONT_PX)
    column = max(_NARROWEST_COLUMN_PX, *(image.width for row in rows for image, _ in row))
    captions = [[_lines(caption, column, font) for _, caption in row] for row in rows]
    caption_heights = [_LINE_PX * max(map(len, row)) for row in captions]
    heights = [above + max(image.height for image, _ in row) for row, above in zip(rows, caption_heights, strict=True)]
    size = (_GAP_PX + max(map(len, rows)) * (column + _GAP_PX), _GAP_PX + sum(height + _GAP_PX for height in heights))
    sheet = Image.new("RGB", size, "white")
    draw, top = ImageDraw.Draw(sheet), _GAP_PX
    for row, row_captions, above, height in zip(rows, captions, caption_heights, heights, strict=True):
        for number, ((image, _), lines) in enumerate(zip(row, row_captions, strict=True)):
            left = _GAP_PX + number * (column + _GAP_PX)
            sheet.paste(image, (left, top + above))
            for line, text in enumerate(reversed(lines), start=1):  # the last one right above the image
                draw.text((left, top + above - (line - 0.5) * _LINE_PX), text, fill="black", font=font, anchor="lm")
        top += height + _GAP_PX
    return sheet


def _lines(caption: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    """Returns the caption in lines that fit into the width."""
    lines = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and len(lines) < _MOST_LINES and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    for number, line in enumerate(lines):
        while font.getlength(line) > width:
            line = line.removesuffix("…")[:-1] + "…"
        lines[number] = line
    return lines


def encode_sheet(sheet: Image.Image, path: str | Path, icc_profile: bytes | None = None) -> bytes:
    """Returns the file that the ending of `path` asks for, PNG or JPEG.

    Raises:
        ValueError: It is another ending.
    """
    buffer = io.BytesIO()
    suffix = Path(path).suffix.lower()
    if suffix in (".jpg", ".jpeg"):
        sheet.save(buffer, "JPEG", quality=92, subsampling=0, icc_profile=icc_profile)
    elif suffix == ".png":
        sheet.save(buffer, "PNG", icc_profile=icc_profile)
    else:
        raise ValueError(f"The name of the sheet {path} must end in .jpg or .png.")
    return buffer.getvalue()


def save_sheet(sheet: Image.Image, path: str | Path, icc_profile: bytes | None = None) -> None:
    """Writes a sheet whole or not at all; makes the folders above it.

    Raises:
        ValueError: As `encode_sheet`.
    """
    content = encode_sheet(sheet, path, icc_profile)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content)


def save_comparison(
    images: Sequence[Tensor], captions: Sequence[str], path: str | Path, icc_profile: bytes | None = None
) -> None:
    """Writes images side by side, each at most 1600 pixels wide and high.

    Args:
        images: Images (3, H, W) in [0, 1], all of one size.
        captions: Captions of the images.
        path: The file, which ends in .jpg or .png; the folders above it are made.
        icc_profile: Profile that describes the values of all images.
    """
    cells = [(to_pil(image), caption) for image, caption in zip(images, captions, strict=True)]
    for image, _ in cells:
        image.thumbnail((_LONGEST_SIDE_PX, _LONGEST_SIDE_PX), Image.Resampling.LANCZOS)
    save_sheet(paint_sheet([cells]), path, icc_profile)
