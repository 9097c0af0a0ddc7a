"""Kinds of image files: which are read, and what is said of those that are not."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

from PIL import features

_HEIF_SUFFIXES = (".heic", ".heif", ".hif")
_AVIF_SUFFIXES = (".avif",)
_RAW_SUFFIXES = (".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".raf", ".orf", ".rw2", ".pef", ".srw")


def _pillow_reads_heif() -> bool:
    """Whether the plugin is installed, which is made known to Pillow."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:  # not there, or its libraries are not
        return False
    register_heif_opener()
    return True


def _pillow_reads_avif() -> bool:
    """Whether Pillow was built so, as from 11.3 on it mostly is, or the plugin for older ones is installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an older one does not know the word
        if features.check("avif"):
            return True
    try:
        import pillow_avif  # noqa: F401 - makes itself known to Pillow
    except ImportError:
        return False
    return True


# Pillow's names of the formats that are read, whatever a file is called. Others start programs (EPS: Ghostscript) or
# go through rarely tested decoders. JPEG covers MPO, several images in one file, of phones and stereo cameras.
IMAGE_FORMATS: tuple[str, ...] = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP")
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp"})

_ADVICE = {suffix: "develop raw files to TIFF or PNG first" for suffix in _RAW_SUFFIXES}
"""Remedy for files of kinds that are not read, by their suffix."""

if _pillow_reads_heif():
    IMAGE_FORMATS += ("HEIF",)
    IMAGE_SUFFIXES |= set(_HEIF_SUFFIXES)
else:
    _ADVICE |= dict.fromkeys(_HEIF_SUFFIXES, "HEIC files are read after `pip install pillow-heif`")
if _pillow_reads_avif():
    IMAGE_FORMATS += ("AVIF",)
    IMAGE_SUFFIXES |= set(_AVIF_SUFFIXES)
else:
    _ADVICE |= dict.fromkeys(_AVIF_SUFFIXES, "AVIF files are read after `pip install -U pillow`")

# Files whose results are of another kind, because theirs is not written.
READ_ONLY_SUFFIXES = frozenset((*_HEIF_SUFFIXES, *_AVIF_SUFFIXES))


def check_kind(path: str | Path) -> None:
    """Refuses a file of a kind that Pillow does not read here, or of which it would read the small preview alone.

    Raises:
        ValueError: It is such a file, by its suffix; the message says what to do.
    """
    if (advice := _ADVICE.get(Path(path).suffix.lower())) is not None:
        raise ValueError(f"{path} cannot be read: {advice}.")


def left_out_in_words(counts: Mapping[str, int]) -> str:
    """Returns "3 files left out: 2 .heic, 1 .dng." of numbers by suffix, with what can be done; "" of none."""
    total = sum(counts.values())
    if not total:
        return ""
    remedies = _remedies(counts)
    files = "1 file" if total == 1 else f"{total} files"
    return f"{files} left out: {_listed(counts)}." + (f" {remedies[0].upper()}{remedies[1:]}." if remedies else "")


def no_images_in_words(folder: Path, others: Mapping[str, int], where: str = "") -> str:
    """Returns what is said of a folder that holds no images but others, given as numbers by suffix."""
    if remedies := _remedies(others):
        return f"The folder {folder} holds no images that are read, but {_listed(others)}: {remedies}."
    return f"The folder {folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}){where}."


def _listed(counts: Mapping[str, int]) -> str:
    """The most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in ordered)


def _remedies(counts: Mapping[str, int]) -> str:
    known = {**_ADVICE, ".gif": "convert GIF files to PNG first"}  # read if named, not in a folder
    return "; ".join(dict.fromkeys(known[suffix] for suffix in sorted(counts) if suffix in known))
