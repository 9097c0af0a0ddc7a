"""From a photo's file to a restored file: what the page of app.py does, without the page."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from adapter_switch import AdapterSwitch
from PIL import Image

from colora_peft import restore_image
from colora_peft.images import FORMATS, ImageFile, fitting_profile, read_image_file, to_pil, write_image_file

MAX_OTHER_ADAPTERS = 8
"""Adapters that users add; the oldest goes for the next one, so that nobody fills the memory."""

_PREVIEW_PIXELS = 1600
_RESULTS_KEPT = 16
_WHOLE_PIXELS = 1_000_000  # larger photos go through the network in tiles
_TILE = 512


@dataclass(frozen=True)
class RestoredPhoto:
    """Files of one restoration: small ones to look at, and the whole result."""

    before: Path
    after: Path
    result: Path
    width: int
    height: int
    seconds: float
    """Of the network alone, without reading and writing."""
    notes: tuple[str, ...]
    """What of the file did not survive, one phrase each."""


class PhotoRestorer:
    """Restores files one at a time, whatever number of threads asks, and keeps the latest results alone.

    Args:
        switch: The network and its adapters.
        max_pixels: Larger photos are refused.
    """

    def __init__(self, switch: AdapterSwitch, max_pixels: int) -> None:
        self.max_pixels = max_pixels
        self._switch = switch
        self._lock = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="restored-", ignore_cleanup_errors=True)
        self._results: dict[tuple[Path, str, float], RestoredPhoto] = {}
        self._others: dict[str, str] = {}

    @property
    def folder(self) -> Path:
        """Where the results are, gone with this object."""
        return Path(self._folder.name)

    @property
    def adapters(self) -> list[str]:
        """Names to choose from: those of the start, and those that were added, called as they were asked for."""
        return [self._others.get(name, name) for name in self._switch.names]

    def add_adapter(self, name_or_path: str) -> str:
        """Load an adapter from a folder or the Hub, unless it is there; the name it has in `adapters`.

        Raises:
            OSError, ValueError: as `colora_peft.load`; all is as it was.
        """
        asked_for = name_or_path.strip()
        if not asked_for:
            raise ValueError("Type the id of an adapter on the Hub, such as name/my-adapter.")
        with self._lock:
            if asked_for in self.adapters:
                return asked_for
            name = f"other_{time.monotonic_ns()}"  # PEFT allows no dots, and an id may have some
            self._switch.add(name, asked_for)
            self._others[name] = asked_for
            if len(self._others) > MAX_OTHER_ADAPTERS:
                oldest = next(iter(self._others))
                self._switch.remove(oldest)
                del self._others[oldest]
            return asked_for

    def restore_file(self, path: str | Path, adapter: str, strength: float, progress: bool = False) -> RestoredPhoto:
        """Restore a photo, tile by tile if it is large.

        Args:
            path: Of the photo; a file that was restored before is taken to be the same still.
            adapter: One of `adapters`, or "none".
            strength: See `AdapterSwitch.activate`.
            progress: Show a bar.

        Raises:
            ValueError: It is no image, damaged or too large; or the adapter or the strength is none that there is.
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
        name = next((name for name, asked_for in self._others.items() if asked_for == adapter), adapter)
        start = time.perf_counter()
        with self._switch.at_work(name, strength) as model:
            tile = None if height * width <= _WHOLE_PIXELS else _TILE
            # One pass to gather averages where the default is two: hardly to be seen, and a third less to wait.
            restored = restore_image(model, image.colour, tile=tile, statistics_passes=1, progress=progress)
        seconds = time.perf_counter() - start
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        result = folder / f"{path.stem}-{adapter.replace('/', '-')}{result_suffix(path)}"
        notes = write_image_file(result, restored, image)
        before, after = folder / "before.jpg", folder / "after.jpg"
        write_preview(before, image)
        write_preview(after, replace(image, colour=restored))
        return RestoredPhoto(before, after, result, width, height, seconds, notes)


def read_checked(path: Path, max_pixels: int) -> ImageFile:
    """Read a photo; what is wrong with it is told with its name alone, not with where it lies on this machine.

    Raises:
        ValueError: It is no image, damaged, or one of more pixels.
    """
    try:
        with Image.open(path) as opened:
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
    """That of the photo, or .png where files of its kind are not written."""
    written = {suffix for file_format in FORMATS.values() for suffix in file_format.suffixes}
    return path.suffix if path.suffix.lower() in written else ".png"


def write_preview(path: Path, image: ImageFile) -> None:
    """What a browser shows: 8 bits, on white, and no larger than a screen."""
    preview = to_pil(image.on_white)
    preview.thumbnail((_PREVIEW_PIXELS, _PREVIEW_PIXELS), Image.Resampling.LANCZOS)
    profile, _ = fitting_profile(image.icc_profile, 3)
    preview.save(path, quality=95, subsampling=0, icc_profile=profile)
