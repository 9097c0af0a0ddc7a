"""Restoring a photo from file to file: the work of the page of app.py, without the page."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from colora_peft.images import (
    FORMATS,
    IMAGE_FORMATS,
    ImageFile,
    fitting_profile,
    read_image_file,
    to_pil,
    without_pillow_s_limit,
    write_image_file,
)
from colora_peft.inference import restore_image

from .adapters import AdapterSet

# Largest number of adapters that users add. The oldest makes room for the next one, so that nobody fills the memory.
MAX_OTHER_ADAPTERS = 8

_PREVIEW_PIXELS = 1600
_RESULTS_KEPT = 16
_WHOLE_PIXELS = 1_000_000  # larger photos go through the network in tiles
_TILE = 512


@dataclass(frozen=True)
class RestoredPhoto:
    """Files of one restoration.

    Attributes:
        before: Small image of the photo, to look at.
        after: Small image of the result.
        result: The whole result.
        width: Width in pixels.
        height: Height in pixels.
        seconds: Time of the network alone, without reading and writing.
        notes: Phrases on what the result does not keep of the photo's file.
    """

    before: Path
    after: Path
    result: Path
    width: int
    height: int
    seconds: float
    notes: tuple[str, ...]


class PhotoRestorer:
    """Restores files one at a time, whatever number of threads asks, and keeps only the latest results.

    Args:
        adapters: The network and its adapters.
        max_pixels: Number of pixels above which photos are refused.
    """

    def __init__(self, adapters: AdapterSet, max_pixels: int) -> None:
        self.max_pixels = max_pixels
        self._adapters = adapters
        self._lock = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="restored-", ignore_cleanup_errors=True)
        self._results: dict[tuple[Path, str, float], RestoredPhoto] = {}
        self._others: list[str] = []

    @property
    def folder(self) -> Path:
        """The folder of the results, which is deleted with this object."""
        return Path(self._folder.name)

    @property
    def adapters(self) -> list[str]:
        """Names to choose from: those of the start, and those that were added, called as they were asked for."""
        return list(self._adapters.labels)

    def add_adapter(self, name_or_path: str) -> str:
        """Loads an adapter of CoLoRA from a folder or the Hub, unless it is there; the name it has in `adapters`.

        Raises:
            ValueError: as `AdapterSet.add`, also for another method; all is as it was.
        """
        asked_for = name_or_path.strip()
        if not asked_for:
            raise ValueError("Type the id of an adapter on the Hub, such as name/my-adapter.")
        with self._lock:
            if asked_for in self.adapters:
                return asked_for
            self._adapters.add(asked_for, asked_for, only_colora=True)
            self._others.append(asked_for)
            if len(self._others) > MAX_OTHER_ADAPTERS:
                self._adapters.remove(self._others.pop(0))
            return asked_for

    def restore_file(self, path: str | Path, adapter: str, strength: float, progress: bool = False) -> RestoredPhoto:
        """Restores a photo, tile by tile if it is large.

        Args:
            path: File of the photo; one that was restored before counts as unchanged.
            adapter: One of `adapters`, or "none".
            strength: See `AdapterSet.activate`.
            progress: Whether to show a bar.

        Raises:
            ValueError: The file is not an image, damaged or too large; or there is no such adapter or strength.
        """
        path = Path(path)
        with self._lock:
            asked_for = (path, adapter, strength)
            if asked_for not in self._results:  # a page asks again when a user looks back
                self._results[asked_for] = self._restore(path, adapter, strength, progress)
            while len(self._results) > _RESULTS_KEPT:
                oldest = self._results.pop(next(iter(self._results)))
                shutil.rmtree(oldest.result.parent, ignore_errors=True)
            return self._results[asked_for]

    def _restore(self, path: Path, adapter: str, strength: float, progress: bool) -> RestoredPhoto:
        image = read_checked(path, self.max_pixels)
        height, width = image.colour.shape[-2:]
        start = time.perf_counter()
        tile = None if height * width <= _WHOLE_PIXELS else _TILE
        # One pass to gather averages where the default is two: it is hardly visible and a third faster.
        restored = restore_image(
            self._adapters.activate(adapter, strength), image.colour, tile=tile, statistics_passes=1, progress=progress
        )
        seconds = time.perf_counter() - start
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        result = folder / f"{path.stem}-{adapter.replace('/', '-')}{result_suffix(path)}"
        notes = write_image_file(result, restored, image)
        before, after = folder / "before.jpg", folder / "after.jpg"
        write_preview(before, image)
        write_preview(after, replace(image, colour=restored))
        return RestoredPhoto(before, after, result, width, height, seconds, notes)


def read_checked(path: Path, max_pixels: int) -> ImageFile:
    """Reads a photo. Errors tell its name alone, because the page's users must not learn the folders of this machine.

    Raises:
        ValueError: The file is not an image, damaged, or one of more pixels.
    """
    try:
        with without_pillow_s_limit, Image.open(path, formats=IMAGE_FORMATS) as opened:
            width, height = opened.size
    # Pillow raises nearly anything on damaged data, and a class of its own on bombs.
    except Exception as error:
        raise ValueError(f"{path.name} cannot be read as an image: take a JPEG, PNG, WebP or TIFF file.") from error
    if width * height > max_pixels:
        raise ValueError(
            f"{path.name} has {width * height / 1e6:.1f} million pixels ({width} x {height}); this page takes up to "
            f"{max_pixels / 1e6:g} million: make it smaller."
        )
    try:
        return read_image_file(path, max_pixels)
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), path.name)) from error


def result_suffix(path: Path) -> str:
    """The photo's suffix, or .png where files of its kind are not written."""
    written = {suffix for file_format in FORMATS.values() for suffix in file_format.suffixes}
    return path.suffix if path.suffix.lower() in written else ".png"


def write_preview(path: Path, image: ImageFile) -> None:
    """Writes an image for a browser: 8 bits, on white, and no larger than a screen."""
    preview = to_pil(image.on_white)
    preview.thumbnail((_PREVIEW_PIXELS, _PREVIEW_PIXELS), Image.Resampling.LANCZOS)
    profile, _ = fitting_profile(image.icc_profile, 3)
    preview.save(path, quality=95, subsampling=0, icc_profile=profile)
