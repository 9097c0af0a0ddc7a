"""Colour profile of a restored image: that of its input, if it is whole and describes what is written."""

from __future__ import annotations

import io
import struct

from PIL import ImageCms

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
