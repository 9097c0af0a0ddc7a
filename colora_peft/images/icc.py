"""Which colour profile a restored image may carry: that of its input, if it is whole and describes what is written.

ICC.1:2022, section 7: a header of 128 bytes with size, colour space and signature, then a table of tags.
"""

from __future__ import annotations

import struct

__all__ = ["fitting_profile", "profile_space"]

_SPACE_OF_CHANNELS = {1: "GRAY", 3: "RGB"}


def fitting_profile(profile: bytes | None, channels: int) -> tuple[bytes | None, str | None]:
    """The profile if it fits pixels of 1 or 3 channels, else None, and a note that says why it was left out.

    Args:
        profile: As it stands in the file.
        channels: Of the pixels that are written, transparency not counted.
    """
    if profile is None:
        return None, None
    try:
        space = profile_space(profile)
    except ValueError:
        return None, "the colour profile is damaged and was left out"
    if space != _SPACE_OF_CHANNELS[channels]:
        kinds = {1: "grey", 3: "RGB"}
        return (
            None,
            f"the colour profile describes {space}, not the {kinds[channels]} that was written, and was left out",
        )
    return profile[: struct.unpack_from(">I", profile)[0]], None


def profile_space(profile: bytes) -> str:
    """The colour space that a profile describes, such as RGB, GRAY or CMYK.

    Raises:
        ValueError: it is cut off, or no ICC profile.
    """
    if len(profile) < 132 or profile[36:40] != b"acsp":
        raise ValueError("no ICC profile")
    size, number_of_tags = struct.unpack_from(">I", profile)[0], struct.unpack_from(">I", profile, 128)[0]
    if not 132 + 12 * number_of_tags <= size <= len(profile):
        raise ValueError("an ICC profile that is cut off")
    for number in range(number_of_tags):
        offset, length = struct.unpack_from(">II", profile, 132 + 12 * number + 4)
        if offset + length > size:
            raise ValueError("an ICC profile whose tags lie outside")
    return profile[16:20].decode("ascii", "replace").strip()
