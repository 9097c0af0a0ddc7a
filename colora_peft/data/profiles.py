"""Colour profiles of pairs: where those of input and target differ, a network learns to convert colours."""

from __future__ import annotations

from functools import cache
from typing import Any

from colora_peft.images import describe_same_colours, profile_name, read_profile


def note_on_profiles(pairs: Any) -> str | None:
    """Returns a note on the pairs whose input and target have profiles of different colours; None if there are none.

    Files without a profile count as sRGB. Images are not converted: a network sees the values of the files.

    Args:
        pairs: A source of pairs; without the method `files` nothing is known of its profiles.
    """
    if not hasattr(pairs, "files"):
        return None
    same, different = cache(describe_same_colours), []
    for index, name in enumerate(pairs.names):
        profiles = [None if file is None else read_profile(file) for file in pairs.files(index)]
        if not same(*profiles):
            different.append((name, *map(profile_name, profiles)))
    if not different:
        return None
    name, of_input, of_target = different[0]
    return (
        f"Note: the colour profiles of input and target differ in {len(different)} of {len(pairs.names)} pairs (in "
        f"{name}: {of_input} and {of_target}), and the network will learn to convert colours as well. If that is not "
        "meant, convert both to one profile first."
    )
