"""Clean images by index, and what makes an image usable; see `hub_columns.py` for Hugging Face datasets.

Images are RGB (3, H, W), as uint8 where their file has 8 bits and as float32 in [0, 1] where it has 16.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from colora_peft.images import read_stored
from colora_peft.utils import digest_of_bytes, some_sentences

Candidate = tuple[str, Callable[[], Tensor]]
"""Name of an image, and a function that reads it."""

_SILENTLY_CHECKED = 100  # images; with more of them the check shows a bar


class ImageSource(Protocol):
    """Clean images by index, uint8 or float32 in [0, 1], not to be written to; `name` tells users which is which.

    `digest` is one line that changes where the images do, so that a resumed run notices.
    """

    digest: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor: ...

    def name(self, index: int) -> str: ...


class ImageFiles:
    """Image files by index; those of 8 bits are kept decoded in memory while they fit into `cache_bytes`."""

    def __init__(self, paths: Sequence[Path], cache_bytes: int = 2**30) -> None:
        self.paths = list(paths)
        self._cache: dict[int, Tensor] = {}
        self._free_bytes = cache_bytes

    @cached_property
    def digest(self) -> str:
        """Digest of the names below the folder they share, and of the sizes."""
        folder = os.path.commonpath([path.parent for path in self.paths]) if self.paths else ""
        lines = (f"{os.path.relpath(path, folder)}:{file_size(path)}" for path in self.paths)
        # "pictures": the run folders of earlier versions hold this line, and a run goes on only where it is the same.
        return digest_of_lines(f"{len(self)} clean pictures", lines)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        image = self._cache.get(index)
        if image is None:
            image = read_stored(self.paths[index])
            if image.dtype == torch.uint8 and image.nbytes <= self._free_bytes:
                self._cache[index] = image
                self._free_bytes -= image.nbytes
        return image

    def name(self, index: int) -> str:
        return str(self.paths[index])


def file_size(path: Path) -> int:
    """Returns the bytes of a file, -1 if it is gone."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def digest_of_lines(title: str, lines: Iterable[str]) -> str:
    """Returns the title, which is for people, and a digest of the lines."""
    content = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")
    return f"{title}, {digest_of_bytes(content)[:16]}"


def check_size(image: Tensor, resolution: int, name: str) -> None:
    """Refuses an image (3, H, W) that is smaller than the patch.

    Raises:
        ValueError: It is; the message names the image.
    """
    height, width = image.shape[-2:]
    if min(height, width) < resolution:
        raise ValueError(
            f"{name} is {width}x{height} pixels, smaller than the patch of {resolution}; "
            "lower --resolution or remove it."
        )


def check_images(images: ImageSource, resolution: int) -> None:
    """Decodes every image once, before a run begins: half a file has a whole header.

    Raises:
        ValueError: Some are unreadable or smaller than the patch; the first 20 are listed with the reason.
    """
    culprits = []
    indices = range(len(images))
    for index in tqdm(indices, desc="checking images", disable=len(indices) <= _SILENTLY_CHECKED):
        try:
            check_size(images[index], resolution, images.name(index))
        except ValueError as error:
            culprits.append(str(error))
    if culprits:
        raise ValueError(f"Of {len(images)} images {len(culprits)} cannot be used. {some_sentences(culprits)}")


def first_usable(candidates: Iterable[Candidate], resolution: int) -> tuple[Tensor, str, list[str]]:
    """Returns the first image that can be read and is no smaller than the patch.

    Args:
        candidates: Images, read one by one.
        resolution: Side of the patch in pixels.

    Returns:
        The image, its name, and why each of those before it was skipped.

    Raises:
        ValueError: None can be used; the reasons are given.
    """
    reasons: list[str] = []
    for name, read in candidates:
        try:
            image = read()
            check_size(image, resolution, name)
        except ValueError as error:
            reasons.append(str(error))
        else:
            return image, name, reasons
    raise ValueError(f"None of {len(reasons)} images drawn can be used. {some_sentences(reasons)}")
