"""The images in a folder, and how many other files lie beside them."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from .kinds import IMAGE_SUFFIXES, no_images_in_words
from .reading import LASTING


def list_images(folder: str | Path, nested: bool = False, left_out: Counter[str] | None = None) -> list[Path]:
    """Returns the images in `folder`, sorted by name, without hidden files.

    Args:
        folder: The folder.
        nested: Whether to search the folders below it, too. Hidden folders and links to folders are left out, and
            with a warning those that may not be read.
        left_out: Numbers of other files by suffix, to which those found here are added; see `left_out_in_words`.

    Raises:
        FileNotFoundError: The folder does not exist.
        ValueError: It holds no image.
        OSError: It may not be read, or the disk of a folder below it fails.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}; check the path.")
    others: set[Path] = set()
    paths = sorted(only_images(walk_files(folder) if nested else folder.iterdir(), others))
    if not paths:
        below = "" if nested else ": those below it are not searched"
        raise ValueError(no_images_in_words(folder, count_kinds(others), f"; name the folder that does{below}"))
    if left_out is not None:
        left_out.update(count_kinds(others))
    return paths


def walk_files(folder: Path, is_skipped: Callable[[Path], bool] = lambda _: False) -> Iterator[Path]:
    """Yields all files below a folder, outside of hidden folders and those that are skipped."""
    for parent, folders, files in os.walk(folder, onerror=_not_silently):
        folders[:] = [name for name in folders if not name.startswith(".") and not is_skipped(Path(parent, name))]
        yield from (Path(parent, name) for name in files)


def _not_silently(error: OSError) -> None:
    """Warns of a folder that may not be read: some, such as lost+found, nobody can allow or move."""
    if error.errno not in LASTING:
        raise error
    warnings.warn(f"The folder {error.filename} is left out: it cannot be read ({error.strerror}).", stacklevel=3)


def only_images(files: Iterable[Path], others: set[Path]) -> Iterator[Path]:
    """Yields the images among files by their suffix, without hidden ones; what is no image goes to the others."""
    for path in files:
        # A Mac leaves a hidden "._photo.jpg" beside each photo on a foreign disk.
        if path.name.startswith(".") or path.is_dir():
            continue
        if path.suffix.lower() in IMAGE_SUFFIXES:
            yield path
        else:
            others.add(path)


def count_kinds(files: Iterable[Path]) -> Counter[str]:
    """Returns the numbers of files by suffix."""
    return Counter(path.suffix.lower() for path in files)
