"""Clean images by index, from a folder or a Hugging Face dataset; for those without an index see `streams.py`.

Images are RGB (3, H, W), as uint8 where their file has 8 bits and as float32 in [0, 1] where it has 16.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from colora_peft.images import decode_stored, read_stored
from colora_peft.utils import some_sentences

_PAUSES_S = (1.0, 4.0)  # between the tries to reach an address
_SILENTLY_CHECKED = 100  # images; with more of them the check shows a bar


class ImageSource(Protocol):
    """Clean images by index, uint8 or float32 in [0, 1], not to be written to; `name` tells users which is which.

    `fingerprint` is one line that changes where the images do, so that a resumed run notices.
    """

    fingerprint: str

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
    def fingerprint(self) -> str:
        """The names below the folder they share, and the sizes; a file that is gone has none."""
        folder = os.path.commonpath([path.parent for path in self.paths]) if self.paths else ""
        lines = (f"{os.path.relpath(path, folder)}:{_size(path)}" for path in self.paths)
        # "pictures": the run folders of earlier versions hold this line, and a run goes on only where it is the same.
        return fingerprint_of(f"{len(self)} clean pictures", lines)

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


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


class HubImages:
    """The images in an image column of a Hugging Face dataset split, by row.

    Raises:
        ValueError: if there is no such column, it does not hold images, or the split is empty.
    """

    def __init__(self, split: Any, column: str) -> None:
        check_column(split.column_names, column)
        if len(split) == 0:
            raise ValueError("The dataset split is empty; choose one that has rows.")
        self._rows = undecoded(split.with_format(None), column).select_columns(column)
        self._column = column
        self.fingerprint = fingerprint_of(f"{len(split)} clean pictures", (column, *column_lines(split, column)))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Tensor:
        return read_cell(self._rows[index][self._column], self.name(index))

    def name(self, index: int) -> str:
        return f"row {index}"


def check_column(columns: Sequence[str] | None, column: str) -> None:
    """Raises ValueError where a dataset has no such column."""
    if column not in (columns or ()):
        raise ValueError(f"The dataset has the columns {columns}, none is called {column}; name it by --image_column.")


def undecoded(split: Any, column: str) -> Any:
    """The dataset with the image column as file bytes or paths: decoded by us, 16-bit colour and the orientation are
    treated as in files.

    Raises:
        ValueError: if the column does not hold images.
    """
    feature = split.features[column]
    if type(feature).__name__ != "Image":
        raise ValueError(
            f"The dataset's column `{column}` holds {feature}, not images; "
            f'cast it with `cast_column("{column}", datasets.Image())`.'
        )
    return split.cast_column(column, dataclasses.replace(feature, decode=False))


def read_cell(cell: dict[str, Any] | None, name: str) -> Tensor:
    """The image in a cell of an undecoded image column, which holds the file's bytes, or its path or address.

    Raises:
        ValueError: if it is missing, cannot be read or is damaged; it calls the image by `name`.
        ConnectionError: if the server of its address does not answer, or not with the file, three times.
    """
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise ValueError(f"The image of {name} is missing; remove that row.")
    if cell["bytes"] is not None:
        return decode_stored(cell["bytes"], f"The image of {name}")
    if "://" not in cell["path"]:
        return read_stored(cell["path"])
    return decode_stored(_download(cell["path"], name), cell["path"])


def _download(address: str, name: str) -> bytes:
    """The file at an address.

    Only what is certain to be so tomorrow is a bad image, that another may replace: if it were also a server that is
    busy, a run would not see the images again that it saw, and could not be resumed exactly.
    """
    import fsspec  # comes with datasets

    files, path = fsspec.url_to_fs(address)
    for pause in (*_PAUSES_S, None):
        try:
            return files.cat_file(path)  # `open` of HTTP calls every failure FileNotFoundError
        except FileNotFoundError as error:
            raise ValueError(f"{address} of {name} is not there; remove that row.") from error
        except Exception as error:  # of the libraries below fsspec; many are no OSError
            if pause is None:
                raise ConnectionError(
                    f"{address} of {name} cannot be read ({str(error) or type(error).__name__}), tried "
                    f"{len(_PAUSES_S) + 1} times; resume the run when it is back, or remove that row."
                ) from error
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def check_size(image: Tensor, resolution: int, name: str) -> None:
    """Refuse an image (3, H, W) that is smaller than the patch.

    Raises:
        ValueError: it names the image.
    """
    height, width = image.shape[-2:]
    if min(height, width) < resolution:
        raise ValueError(
            f"{name} is {width}x{height} pixels, smaller than the patch of {resolution}; "
            "lower --resolution or remove it."
        )


def check_images(images: ImageSource, resolution: int) -> None:
    """Decode every image once, before a run begins: half a file has a whole header.

    Raises:
        ValueError: if some are unreadable or smaller than the patch; it lists them (the first 20) with the reason.
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


def first_usable(
    candidates: Iterable[tuple[str, Callable[[], Tensor]]], resolution: int
) -> tuple[Tensor, str, list[str]]:
    """The first image that can be read and is no smaller than the patch.

    Args:
        candidates: Names of images and how to read them; asked for one by one.
        resolution: Side of the patch in pixels.

    Returns:
        The image, its name, and why each of those before it was skipped.

    Raises:
        ValueError: if none can be used; it gives the reasons.
    """
    reasons: list[str] = []
    for name, read in candidates:
        try:
            image = read()
            check_size(image, resolution, name)
        except ValueError as error:
            reasons.append(str(error))
            continue
        return image, name, reasons
    raise ValueError(f"None of {len(reasons)} images drawn can be used. {some_sentences(reasons)}")


def column_lines(split: Any, column: str) -> list[str]:
    """What a column of images holds, for a fingerprint: the names and sizes of its files, in order.

    Not the fingerprint of `datasets`, which changes with the date of the files and so with every copy of them.
    """
    import pyarrow.compute as pc  # comes with datasets

    lines: list[str] = []
    for chunk in split.data.column(column).chunks:
        sizes = pc.binary_length(pc.struct_field(chunk, "bytes")).to_pylist()
        names = pc.struct_field(chunk, "path").to_pylist()
        lines += (_file_line(name, size) for name, size in zip(names, sizes, strict=True))
    if split._indices is None:
        return lines
    return [lines[index] for index in split._indices.column(0).to_pylist()]  # rows were selected or shuffled


def _file_line(name: str | None, size: int | None) -> str:
    """Of an image that the dataset holds, or that lies at a path or, unseen, at an address."""
    if name is None or size is not None:
        return f"{name and os.path.basename(name)}:{size}"
    return name if "://" in name else f"{os.path.basename(name)}:{_size(Path(name))}"


def fingerprint_of(what: str, lines: Iterable[str]) -> str:
    """`what`, for people, and a digest of the lines."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode("utf-8", "surrogateescape"))
    return f"{what}, {digest.hexdigest()[:16]}"
