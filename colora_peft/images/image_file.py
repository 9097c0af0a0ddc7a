"""Image files with what must survive their restoration, and restored images as files of the same kind.

The choices below are ours. These parts of a file survive:

- Bit depth: 8 or 16 in PNG and TIFF. JPEG, WebP and BMP hold 8; a note says so.
- EXIF, with the orientation set to 1, since it was applied, and without the thumbnail, which shows the input. In and
  out of TIFF the descriptive entries survive (see `exif.py`). XMP, IPTC and comments do not.
- The ICC profile. There is no colour management: the network sees the values of the file, and the profile goes on
  describing them. A damaged profile, or one of other values (CMYK that was converted), is left out.
- Transparency, which is put back as it was; the network restores the colours below it. Formats that hold none get
  the image on white.
- Grey, as the mean of what the network makes of three equal channels. WebP holds RGB only.
- Resolution (dots per inch) and, from PNG to PNG, gamma, chromaticities and the sRGB mark.
- The first image of an animation or of several pages; a note says so.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from colora_peft.utils import SharedSettings, write_bytes

from .exif import block_of_tiff, upright
from .formats import FORMATS, Content, ImageFormat, format_of, png_chunks
from .icc import fitting_profile
from .kinds import IMAGE_FORMATS
from .limits import DEFAULT_MAX_PIXELS, check_pixels, without_pillow_s_limit
from .reading import decode_straight, has_16_bits, naming, on_white, read_bytes

_EXIF_MARK = b"Exif\0\0"
_DESCRIBES_COLOUR = (b"gAMA", b"cHRM", b"sRGB", b"cICP")
_GREY_MODES = ("1", "L", "LA", "La")


@dataclass(frozen=True)
class ImageFile:
    """Image that stands upright, and what its restored version inherits.

    Attributes:
        colour: (3, H, W) float32 in [0, 1], straight: not laid on white.
        opacity: (1, H, W), or None.
        bits: Bits of a value in the file, 8 or 16.
        is_grey: Whether the file holds one channel.
        is_lossless_webp: Whether it is an exact WebP.
        exif: An EXIF block that fits the upright image, or None.
        icc_profile: As it stands in the file, or None.
        dpi: Dots per inch, horizontal and vertical, or None.
        colour_chunks: Chunks of a PNG about its colours besides the profile, by name.
        notes: Phrases on what does not survive.
    """

    colour: Tensor
    opacity: Tensor | None
    bits: int
    is_grey: bool
    is_lossless_webp: bool
    exif: bytes | None
    icc_profile: bytes | None
    dpi: tuple[float, float] | None
    colour_chunks: dict[bytes, bytes]
    notes: tuple[str, ...]

    @property
    def on_white(self) -> Tensor:
        """The colour (3, H, W) as `read_image` gives it, up to the rounding of half transparent 8 bits."""
        return self.colour if self.opacity is None else on_white(self.colour, self.opacity)


# ----------------------------------------------------------------------------------------------------------- reading


def read_image_file(path: str | os.PathLike[str], max_pixels: int = DEFAULT_MAX_PIXELS) -> ImageFile:
    """Reads an image and what must survive.

    Args:
        path: A file of any kind that `read_image` reads.
        max_pixels: Largest number of pixels; larger images are refused before they are decoded. It replaces Pillow's
            own limit, which is global to the process and suspended meanwhile.

    Raises:
        ValueError: The file is missing, not an image, damaged or too large; the message names it.
    """
    data = read_bytes(path)
    with naming(str(path)), without_pillow_s_limit, _silence:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as opened:
            check_pixels(opened, max_pixels, ", `max_pixels`")
            several = getattr(opened, "n_frames", 1) > 1
            opened.load()
            colour, opacity = decode_straight(opened, data)
            notes = ["only the first image of several in the file was restored"] if several else []
            if opened.mode == "CMYK":
                notes.append("CMYK became RGB, without colour management")
            exif, note = _exif_of(opened, data, colour.shape[2], colour.shape[1])
            return ImageFile(
                colour,
                opacity,
                bits=16 if has_16_bits(opened, data) else 8,
                is_grey=_is_grey(opened, data),
                is_lossless_webp=opened.format == "WEBP" and b"VP8L" in data[12:16] + _webp_chunk_names(data),
                exif=exif,
                icc_profile=opened.info.get("icc_profile") or None,
                dpi=_dpi_of(opened),
                colour_chunks=_colour_chunks(data) if opened.format == "PNG" else {},
                notes=(*notes, *([note] if note else [])),
            )


@contextmanager
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


_silence = SharedSettings(_no_warnings)
"""Context without warnings on metadata: what is damaged is left out with a note."""


def _is_grey(opened: Image.Image, data: bytes) -> bool:
    if opened.format == "PNG":  # Pillow calls 16 bits of grey with transparency RGBA
        return data[25] in (0, 4)  # the colour type in the IHDR chunk, which is always first
    return opened.mode in _GREY_MODES or opened.mode.startswith("I;16")


def _exif_of(opened: Image.Image, data: bytes, width: int, height: int) -> tuple[bytes | None, str | None]:
    """Returns the EXIF block for the upright image, and a note if it is lost."""
    if opened.format == "TIFF" and data[2:4] in (b"+\0", b"\0+"):
        return None, "the EXIF of a BigTIFF was left out"
    try:
        if opened.format == "TIFF":
            block = block_of_tiff(data)
        elif "Raw profile type exif" in opened.info:  # ImageMagick's, from before PNG had a chunk for it
            block = bytes.fromhex("".join(opened.info["Raw profile type exif"].split("\n")[3:]))
        else:
            block = opened.info.get("exif")
        block = (block or b"").removeprefix(_EXIF_MARK)
        return (upright(block, width, height) if block else None), None
    except ValueError:
        return None, "the EXIF is damaged and was left out"


def _dpi_of(opened: Image.Image) -> tuple[float, float] | None:
    try:
        horizontal, vertical = (float(value) for value in opened.info["dpi"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    # Pillow says 1 of a TIFF that says nothing.
    sound = all(math.isfinite(value) and 1 < value <= 100_000 for value in (horizontal, vertical))
    return (horizontal, vertical) if sound else None


def _colour_chunks(data: bytes) -> dict[bytes, bytes]:
    return {name: content for name, content in png_chunks(data) if name in _DESCRIBES_COLOUR}


def _webp_chunk_names(data: bytes) -> bytes:
    names, position = b"", 12
    while position + 8 <= len(data):
        names += data[position : position + 4]
        if data[position : position + 4] == b"ANMF":  # a frame of an animation: 16 bytes, then a chunk of its own
            names += data[position + 24 : position + 28]
        position += 8 + (length := int.from_bytes(data[position + 4 : position + 8], "little")) + length % 2
    return names


# ----------------------------------------------------------------------------------------------------------- writing


def write_image_file(
    path: str | os.PathLike[str], restored: Tensor, source: ImageFile, *, quality: int = 95, grey_as_rgb: bool = False
) -> tuple[str, ...]:
    """Writes what `encode_image_file` gives, whole or not at all, and returns the notes.

    Raises:
        ValueError: As `encode_image_file`.
        OSError: The file cannot be written.
    """
    encoded, notes = encode_image_file(path, restored, source, quality=quality, grey_as_rgb=grey_as_rgb)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, encoded)
    return notes


def encode_image_file(
    path: str | os.PathLike[str], restored: Tensor, source: ImageFile, *, quality: int = 95, grey_as_rgb: bool = False
) -> tuple[bytes, tuple[str, ...]]:
    """Returns the file of a restored image, with what it inherits, and notes on what is lost.

    Args:
        path: Path of the file, whose suffix chooses the format. Nothing is written.
        restored: (3, H, W) float; clamped to [0, 1] and rounded to the bits of the file.
        source: The image that was restored.
        quality: Quality of JPEG (without chroma subsampling) and WebP, 1 to 100. The other formats are exact, and so
            is a WebP whose source is an exact WebP.
        grey_as_rgb: Whether the result of a grey image is written in colour.

    Raises:
        ValueError: The sizes differ, the suffix is of no format that can be written, or the format cannot hold so many
            pixels.
    """
    path = Path(path)
    file_format = FORMATS[format_of(path)]
    if restored.shape != source.colour.shape:
        raise ValueError(
            f"The restored image has the shape {tuple(restored.shape)}, its source {tuple(source.colour.shape)}; "
            "they must be equal."
        )
    content, notes = _content(restored, source, file_format, quality, grey_as_rgb)
    try:
        encoded = file_format.encode(content)
    # Encoders raise as various errors as decoders.
    except Exception as error:
        raise ValueError(
            f"{path.name} cannot be written as {file_format.name} ({error}); choose another format."
        ) from error
    return encoded, (*source.notes, *notes)


def _content(
    restored: Tensor, source: ImageFile, file_format: ImageFormat, quality: int, grey_as_rgb: bool
) -> tuple[Content, list[str]]:
    """Returns what goes into the file, and notes on what does not."""
    notes, name, bits = [], file_format.name, min(source.bits, file_format.bits)
    colour, opacity = restored.detach().float().cpu().clamp(0, 1), source.opacity
    if opacity is not None and not file_format.has_opacity:
        colour, opacity = on_white(colour, opacity), None
        notes.append(f"transparency was laid on white: {name} holds none")
    if source.is_grey and not grey_as_rgb:
        colour = colour.mean(0, keepdim=True)
        if not file_format.has_grey or (name == "TIFF" and bits == 16 and opacity is not None):  # Pillow reads no such
            colour = colour.expand(3, -1, -1)
            notes.append(f"grey was written as RGB: {name} holds no such grey")
    if bits < source.bits:
        notes.append(f"{source.bits} bits became {bits}: {name} holds no more")
    profile, note = fitting_profile(source.icc_profile, len(colour))
    notes += [note] if note else []
    exif = source.exif
    if exif is not None and len(exif) > file_format.exif_bytes:
        exif = None
        notes.append(f"the EXIF was left out: {name} holds none of its size")
    planes = colour if opacity is None else torch.cat([colour, opacity])
    levels = planes.mul(2**bits - 1).round().permute(1, 2, 0).numpy()
    pixels = levels.astype("uint8" if bits == 8 else "uint16")
    exact = source.is_lossless_webp
    return Content(pixels, exif, profile, source.dpi, source.colour_chunks, quality, exact), notes
