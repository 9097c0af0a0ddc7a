"""Colour profiles of files: whether one fits a restored image, and whether two describe the same colours."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from .limits import without_pillow_s_limit

_DIFFERENCE = 2  # of 255; profiles that are all called sRGB differ by less on average
_STEPS = np.linspace(0, 255, 6).round().astype(np.uint8)  # of each channel, for a sample of all colours

_WRITTEN = {1: ("GRAY", "grey"), 3: ("RGB", "RGB")}


def fitting_profile(profile: bytes | None, channels: int) -> tuple[bytes | None, str | None]:
    """Returns the profile if it fits pixels of 1 or 3 channels, else None, and a note on why it was left out.

    Args:
        profile: Profile as it stands in the file.
        channels: Number of channels that are written, without transparency.
    """
    if profile is None:
        return None, None
    try:
        described = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space.strip()
    except OSError:
        described = None
    size = _size_of_whole(profile) if described else None
    if size is None:
        return None, "the colour profile is damaged and was left out"
    space, kind = _WRITTEN[channels]
    if described != space:
        return None, f"the colour profile describes {described}, not the {kind} that was written, and was left out"
    return profile[:size], None


def _size_of_whole(profile: bytes) -> int | None:
    """Returns the size that the header says, or None if the file or a tag ends before (Little CMS reads these too)."""
    size, tags = struct.unpack_from(">I", profile)[0], struct.unpack_from(">I", profile, 128)[0]
    ends = (sum(struct.unpack_from(">II", profile, 136 + 12 * tag)) for tag in range(tags))
    return size if size <= len(profile) and all(end <= size for end in ends) else None


def read_profile(file: str | Path | bytes) -> bytes | None:
    """Returns the profile in an image file, given by its path or content, or None. Pixels are not decoded."""
    try:
        with without_pillow_s_limit, Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as opened:
            return opened.info.get("icc_profile") or None
    # Pillow raises nearly anything on damaged files, which others report.
    except Exception:
        return None


def profile_name(profile: bytes | None) -> str:
    """Returns what a profile calls itself."""
    if profile is None:
        return "no profile"
    try:
        return ImageCms.getProfileDescription(io.BytesIO(profile)).strip() or "a profile without a name"
    except (OSError, ImageCms.PyCMSError):
        return "a damaged profile"


def describe_same_colours(profile: bytes | None, other: bytes | None) -> bool:
    """Returns whether equal RGB values mean nearly the same colours by both profiles; None is sRGB.

    True also where that is not known, of profiles that are damaged or not of RGB.
    """
    if profile == other:
        return True
    values = np.stack(np.meshgrid(_STEPS, _STEPS, _STEPS), -1).reshape(1, -1, 3)
    try:
        ours, theirs = (
            ImageCms.createProfile("sRGB") if each is None else ImageCms.ImageCmsProfile(io.BytesIO(each))
            for each in (profile, other)
        )
        converted = ImageCms.profileToProfile(
            Image.fromarray(values), ours, theirs, ImageCms.Intent.RELATIVE_COLORIMETRIC
        )
    except (OSError, ImageCms.PyCMSError):
        return True
    return np.abs(np.asarray(converted, np.int16) - values).mean() <= _DIFFERENCE
