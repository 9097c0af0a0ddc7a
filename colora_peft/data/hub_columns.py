"""Image columns of Hugging Face datasets: checked, read undecoded, and digested.

The files in a column are decoded by this package: 16-bit colour and the orientation are treated as in files.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from colora_peft.images import decode_stored, read_stored

from .sources import digest_of_lines, file_size

_PAUSES_S = (1.0, 4.0)  # between the tries to reach an address


class HubImages:
    """Images in an image column of a Hugging Face dataset split, by row.

    Raises:
        ValueError: There is no such column, it does not hold images, or the split is empty.
    """

    def __init__(self, split: Any, column: str) -> None:
        check_column(split.column_names, column)
        check_not_empty(split)
        self._rows = undecoded(split.with_format(None), column).select_columns(column)
        self._column = column
        # "pictures": the run folders of earlier versions hold this line.
        self.digest = digest_of_lines(f"{len(split)} clean pictures", (column, *column_lines(split, column)))

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


def check_not_empty(split: Any) -> None:
    """Raises ValueError where a split has no rows."""
    if len(split) == 0:
        raise ValueError("The dataset split is empty; choose one that has rows.")


def undecoded(split: Any, column: str) -> Any:
    """Returns the dataset with the image column as file bytes or paths.

    Raises:
        ValueError: The column does not hold images.
    """
    feature = split.features[column]
    if type(feature).__name__ != "Image":
        raise ValueError(
            f"The dataset's column `{column}` holds {feature}, not images; "
            f'cast it with `cast_column("{column}", datasets.Image())`.'
        )
    return split.cast_column(column, dataclasses.replace(feature, decode=False))


def read_cell(cell: dict[str, Any] | None, name: str) -> Tensor:
    """Returns the image in a cell of an undecoded column, which holds the file's bytes, or its path or address.

    Raises:
        ValueError: It is missing, cannot be read or is damaged; the message calls the image by `name`.
        ConnectionError: The server of its address does not answer, or not with the file, three times.
    """
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise ValueError(f"The image of {name} is missing; remove that row.")
    if cell["bytes"] is not None:
        return decode_stored(cell["bytes"], f"The image of {name}")
    if "://" not in cell["path"]:
        return read_stored(cell["path"])
    return decode_stored(_download(cell["path"], name), cell["path"])


def _download(address: str, name: str) -> bytes:
    """Returns the file at an address.

    Only what is certain to be so tomorrow is a bad image, which another may replace. A busy server is not: the run
    would not see the same images again, and could not be resumed exactly.
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


def column_lines(split: Any, column: str) -> list[str]:
    """Returns the names and sizes of the files in a column of images, in order, for a digest.

    The fingerprint of `datasets` does not serve: it changes with the date of the files and so with every copy.
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
    """Returns the line of a file that the dataset holds, or that lies at a path or, unseen, at an address."""
    if name is None or size is not None:
        return f"{name and os.path.basename(name)}:{size}"
    return name if "://" in name else f"{os.path.basename(name)}:{file_size(Path(name))}"
