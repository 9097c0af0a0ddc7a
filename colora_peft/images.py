"""Reading and writing pictures: files of any kind to float32 RGB (3, H, W) in [0, 1], and back."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp"})


def list_images(folder: str | Path) -> list[Path]:
    """The pictures in `folder` (not below it), sorted by name.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if it holds no picture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}; check the path.")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(f"The folder {folder} holds no pictures ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    return paths


def read_image(path: str | Path) -> Tensor:
    """Read a picture as float32 RGB (3, H, W) in [0, 1].

    The EXIF orientation is applied, grey becomes RGB, transparency is laid on white, palettes and CMYK are converted,
    and the 16 bits of PNG and TIFF files are kept.

    Raises:
        ValueError: if the file is not a picture or is damaged; it names the file.
    """
    try:
        with Image.open(path) as opened:
            opened.load()
            if not _has_16_bits(opened):
                return from_pil(opened)
            orientation = opened.getexif().get(0x0112, 1)
        return _read_16_bits(path, orientation)
    except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture ({error}); replace or remove it.") from error


def from_pil(image: Image.Image) -> Tensor:
    """An 8-bit Pillow picture of any mode to float32 RGB (3, H, W) in [0, 1], EXIF orientation applied."""
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float().div_(255)


def _has_16_bits(image: Image.Image) -> bool:
    # Pillow halves 16-bit colour silently; only the raw mode of its decoder tells, e.g. "RGB;16B".
    if image.mode.startswith("I"):
        return True
    if image.format == "TIFF":
        return 16 in tuple(image.tag_v2.get(258, ()))
    return image.format == "PNG" and _png_bit_depth(image.filename) == 16


def _png_bit_depth(path: str) -> int:
    with open(path, "rb") as file:
        return file.read(25)[24]  # the ninth byte of the IHDR chunk, which is always first


def _read_16_bits(path: str | Path, orientation: int) -> Tensor:
    pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16:
        raise OSError("its 16-bit data could not be decoded")
    pixels = pixels.astype(np.float32) / 65535
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    elif pixels.shape[2] == 4:
        pixels = pixels[..., :3] * pixels[..., 3:] + (1 - pixels[..., 3:])
        pixels = pixels[..., ::-1]
    else:
        pixels = pixels[..., ::-1]
    return torch.from_numpy(_oriented(pixels, orientation)).permute(2, 0, 1).contiguous()


def _oriented(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo the eight EXIF orientations on an (H, W, 3) array."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] (clamped) to an 8-bit RGB Pillow picture."""
    pixels = image.detach().float().cpu().clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
