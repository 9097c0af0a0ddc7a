"""Image files of any kind as float32 RGB (3, H, W) in [0, 1].

The EXIF orientation is applied, grey becomes RGB, transparency is laid on white, palettes and CMYK are converted, and
the 16 bits of PNG and TIFF files are kept. An image of 8 bits may be held as it is *stored*, uint8 RGB (3, H, W), in a
quarter of the memory; `as_float` turns it into floats.
"""

from __future__ import annotations

import errno
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from .kinds import IMAGE_FORMATS, check_kind
from .limits import DEFAULT_MAX_PIXELS, check_pixels, without_pillow_s_limit

# Errors that will be the same tomorrow: no fault of a disk or a network drive.
LASTING = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM})
LASTING |= {errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL}

# TIFF and EXIF tags, and values of the photometric interpretation.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _ORIENTATION, _SAMPLES_PER_PIXEL, _PLANAR_CONFIGURATION = 258, 262, 274, 277, 284
_EXTRA_SAMPLES = 338
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB = 0, 1, 2
_OPACITY_IS_MULTIPLIED_IN = 1
_TURNS = (5, 6, 7, 8)  # orientations that exchange width and height


def read_image(path: str | Path) -> Tensor:
    """Reads an image as float32 RGB (3, H, W) in [0, 1].

    Raises:
        ValueError: The file is missing, not an image or damaged; the message names it.
    """
    return as_float(read_stored(path))


def read_stored(path: str | Path) -> Tensor:
    """Reads an image as it is stored: uint8 (3, H, W) where the file has no more than 8 bits, else as `read_image`.

    Raises:
        ValueError: As `read_image`.
    """
    return decode_stored(read_bytes(path), str(path))


def read_bytes(path: str | Path) -> bytes:
    """Reads a file.

    Raises:
        ValueError: It is missing or may not be read; the message names it.
        OSError: A disk, a network drive or this machine failed, which may be over tomorrow.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        if error.errno in LASTING:
            raise ValueError(f"{path} cannot be read ({error.strerror}); check that the file is there.") from error
        raise OSError(f"{path} cannot be read ({error.strerror}); try again when its disk is back.") from error


def as_float(image: Tensor) -> Tensor:
    """Returns an image or patch of 8 bits as new float32 in [0, 1]; one that is float already as it is."""
    return image.float().div_(255) if image.dtype == torch.uint8 else image


def decode_stored(data: bytes, name: str) -> Tensor:
    """Decodes the bytes of an image file, as `read_stored` does.

    Raises:
        ValueError: They are not an image, damaged, or have more than `DEFAULT_MAX_PIXELS`; the message calls the image
            by `name`.
    """
    with naming(name), without_pillow_s_limit, Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as opened:
        check_pixels(opened, DEFAULT_MAX_PIXELS, ": cut it into smaller ones")
        opened.load()
        if not has_16_bits(opened, data):
            return _decode_8_bits(opened, keep_opacity=False)
        colour, opacity = _decode_16_bits(opened, data)
        return colour if opacity is None else on_white(colour, opacity)


def decode_straight(opened: Image.Image, data: bytes) -> tuple[Tensor, Tensor | None]:
    """Returns colour (3, H, W) and opacity (1, H, W), float32 in [0, 1], of an image that keeps its transparency.

    The colours are those below the transparency. The opacity is None where there is none.

    Args:
        opened: The image, loaded by Pillow.
        data: The bytes of its file.

    Raises:
        ValueError: Its values have no agreed white, or it has 16 bits in a layout that is not read.
    """
    if has_16_bits(opened, data):
        return _decode_16_bits(opened, data)
    pixels = as_float(_decode_8_bits(opened, keep_opacity=True))
    return pixels[:3], pixels[3:] if len(pixels) == 4 else None


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Context that turns whatever goes wrong while an image is decoded into a ValueError that names it."""
    try:
        yield
    except UnidentifiedImageError as error:  # its message shows a buffer's address
        check_kind(name)
        raise ValueError(f"{name} cannot be read as an image (unknown format); replace or remove it.") from error
    # On damaged data the decoders raise nearly anything: OSError, SyntaxError, struct.error, zlib.error...
    except Exception as error:
        raise ValueError(f"{name} cannot be read as an image ({error}); replace or remove it.") from error


def on_white(colour: Tensor, opacity: Tensor) -> Tensor:
    """Returns colour (3, H, W) seen through its opacity (1, H, W) on white paper."""
    return colour * opacity + (1 - opacity)


def _decode_8_bits(image: Image.Image, keep_opacity: bool) -> Tensor:
    """Returns uint8 values (3, H, W), or (4, H, W) of a transparent image that keeps its opacity.

    Raises:
        ValueError: It has more than 8 bits: 32 have no agreed white.
    """
    if image.mode.startswith("I") or image.mode == "F":
        raise ValueError("its values have no agreed white; save it with 8 or 16 bits as PNG or TIFF")
    orientation, mode = _orientation(image), "RGB"
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if keep_opacity:
            mode = "RGBA"
        else:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return torch.from_numpy(_oriented(np.array(image.convert(mode)), orientation)).permute(2, 0, 1).contiguous()


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    # Pillow raises nearly anything on damaged EXIF, for which no image is refused.
    except Exception:
        return 1


def is_turned(file: str | Path | io.BytesIO) -> bool:
    """Whether the EXIF orientation of an image file exchanges its width and height."""
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as opened:
            return _orientation(opened) in _TURNS
    # Whoever reads the image itself says what is wrong with it.
    except Exception:
        return False


def why_turned(first: Tensor, second: Tensor, first_is_turned: bool, second_is_turned: bool) -> str:
    """Reason in words why an input and its target (3, H, W) have each other's width and height; "" if they do not."""
    if first.shape[-2:] != second.shape[:-3:-1]:
        return ""
    if first_is_turned == second_is_turned:
        return " (one of them is turned by 90 degrees)"
    one, other = ("input", "target") if first_is_turned else ("target", "input")
    return (
        f" (the {one} is turned by its EXIF orientation, which the {other} lost: turn the pixels of the {other}, too, "
        f"or remove the tag from the {one})"
    )


def has_16_bits(image: Image.Image, data: bytes) -> bool:
    """Whether an image that Pillow opened from `data` is a PNG or TIFF of 16 bits a value."""
    # Pillow halves 16-bit colour silently, so its mode does not tell.
    if image.format == "TIFF":
        return 16 in np.ravel(image.tag_v2.get(_BITS_PER_SAMPLE, ()))
    return image.format == "PNG" and data[24] == 16  # the ninth byte of the IHDR chunk, which is always first


def _decode_16_bits(image: Image.Image, data: bytes) -> tuple[Tensor, Tensor | None]:
    """Returns colour and opacity of a PNG or TIFF of 16 bits, as `decode_straight`."""
    if image.format == "TIFF":
        _check_layout(image)
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16:
        raise ValueError("its 16-bit data could not be decoded")
    if image.format == "PNG":  # OpenCV has oriented a TIFF, but not a PNG
        pixels = _oriented(pixels, _orientation(image))
    elif image.tag_v2[_PHOTOMETRIC] == _WHITE_IS_ZERO:
        pixels = 65535 - pixels
    pixels = pixels.astype(np.float32) / 65535
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    # OpenCV's channels are blue, green, red and opacity.
    colour, opacity = (torch.from_numpy(part).permute(2, 0, 1).contiguous()
                       for part in (np.ascontiguousarray(pixels[..., 2::-1]), pixels[..., 3:]))  # fmt: skip
    if not len(opacity):
        return colour, None
    if image.format == "TIFF" and _OPACITY_IS_MULTIPLIED_IN in np.ravel(image.tag_v2.get(_EXTRA_SAMPLES, ())):
        colour = torch.where(opacity > 0, colour / opacity, colour).clamp_(max=1)
    return colour, opacity


def _check_layout(image: Image.Image) -> None:
    """Raises ValueError for the 16-bit TIFFs that OpenCV decodes wrongly without a word."""
    planes_apart = image.tag_v2.get(_PLANAR_CONFIGURATION, 1) == 2 and image.tag_v2.get(_SAMPLES_PER_PIXEL, 1) > 1
    if image.tag_v2.get(_PHOTOMETRIC) not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB) or planes_apart:
        raise ValueError("a 16-bit TIFF must be grey or RGB with the colours interleaved; save it so, or as PNG")


def _oriented(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Applies any of the eight EXIF orientations to an (H, W) or (H, W, C) array."""
    if orientation in _TURNS:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def to_pil(image: Tensor) -> Image.Image:
    """Turns (3, H, W) in [0, 1], clamped, into an 8-bit RGB Pillow image."""
    pixels = image.detach().float().cpu().clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
