"""Where pictures come from: folders of clean ones, folders and Hugging Face datasets of degraded/clean pairs.

Pictures are float32 RGB (3, H, W) in [0, 1].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .images import decode_image, list_images, read_image
from .messages import some, some_sentences

Pair = tuple[Tensor, Tensor]  # degraded input and clean target of one size

_SILENTLY_CHECKED = 100  # pictures; with more of them the check shows a bar


class PictureSource(Protocol):
    """Clean pictures by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor: ...


class PairSource(Protocol):
    """Degraded and clean pictures of the same scene and size, by index; `names` tells users which is which."""

    names: Sequence[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair: ...


class ImageFiles:
    """Pictures by index, kept decoded as 8 bits in memory while they fit into `cache_bytes`."""

    def __init__(self, paths: Sequence[Path], cache_bytes: int = 2**30) -> None:
        self.paths = list(paths)
        self._cache: dict[int, Tensor] = {}
        self._free_bytes = cache_bytes

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        cached = self._cache.get(index)
        if cached is not None:
            return _to_float(cached)
        image = read_image(self.paths[index])
        stored = _to_bytes(image)
        if stored is not None and stored.nbytes <= self._free_bytes:
            self._cache[index] = stored
            self._free_bytes -= stored.nbytes
        return image

    def check(self, resolution: int) -> None:
        """Decode every file once, before a run begins: half a file has a whole header. Fills the cache.

        Raises:
            ValueError: if some are unreadable or smaller than the patch; it lists them (the first 20) with the reason.
        """
        culprits = []
        for index, path in enumerate(
            tqdm(self.paths, desc="checking pictures", disable=len(self) <= _SILENTLY_CHECKED)
        ):
            try:
                height, width = self[index].shape[-2:]
            except ValueError as error:
                culprits.append(str(error))
                continue
            if min(height, width) < resolution:
                culprits.append(
                    f"{path} is {width}x{height} pixels, smaller than the patch of {resolution}; "
                    "lower --resolution or remove it."
                )
        if culprits:
            raise ValueError(f"Of {len(self)} pictures {len(culprits)} cannot be used. {some_sentences(culprits)}")


def _to_float(stored: Tensor) -> Tensor:
    return stored.float().div_(255)


def _to_bytes(image: Tensor) -> Tensor | None:
    """The picture as 8 bits, or None if that would lose something: a 16-bit picture is not cached."""
    stored = image.mul(255).round().byte()
    return stored if torch.equal(_to_float(stored), image) else None


class PairedImageFolder:
    """`input/` and `target/` under one folder, paired by equal file names (the suffix may differ).

    Raises:
        FileNotFoundError: if a folder is missing.
        ValueError: if a folder is empty, a name has no partner (the first 20 are listed) or two files share a name.
    """

    def __init__(self, folder: str | Path) -> None:
        inputs, targets = (_by_stem(side) for side in _sides(Path(folder)))
        orphans = sorted(inputs.keys() ^ targets.keys())
        if orphans:
            sides = [f"{name} (only in {'input' if name in inputs else 'target'})" for name in orphans]
            raise ValueError(
                f"In {folder} these pictures have no partner of the same name: {some(sides)}. Add the missing ones, "
                "rename them or remove these."
            )
        self.names = sorted(inputs)
        self._inputs = ImageFiles([inputs[name] for name in self.names])
        self._targets = ImageFiles([targets[name] for name in self.names])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Pair:
        return check_pair(self.names[index], self._inputs[index], self._targets[index])


def _sides(folder: Path) -> tuple[Path, Path]:
    sides = (folder / "input", folder / "target")
    for needed in (folder, *sides):
        if not needed.is_dir():
            raise FileNotFoundError(
                f"There is no folder {needed}; check the path. Pairs are read from a folder that holds `input/` and "
                "`target/` with pictures of the same file names."
            )
    return sides


def _by_stem(folder: Path) -> dict[str, Path]:
    by_stem: dict[str, Path] = {}
    for path in list_images(folder):
        if path.stem in by_stem:
            raise ValueError(f"{folder} holds {by_stem[path.stem].name} and {path.name}: keep one of each name.")
        by_stem[path.stem] = path
    return by_stem


class PairedHubDataset:
    """A Hugging Face dataset split with the image columns `input` and `target`.

    Raises:
        ValueError: if a column is missing or does not hold images, or the split is empty.
    """

    def __init__(self, split: Any) -> None:
        missing = {"input", "target"} - set(split.column_names)
        if missing:
            raise ValueError(
                f"The dataset has the columns {split.column_names}; rename yours to `input` and `target` "
                f"(missing: {', '.join(sorted(missing))})."
            )
        if len(split) == 0:
            raise ValueError("The dataset split is empty; choose one that has rows.")
        self._split = split.with_format(None)
        for column in ("input", "target"):
            feature = split.features[column]
            if type(feature).__name__ != "Image":
                raise ValueError(
                    f"The dataset's column `{column}` holds {feature}, not images; "
                    f'cast it with `cast_column("{column}", datasets.Image())`.'
                )
            # Decoded here and not there: 16-bit colour and the orientation are then treated as in files.
            self._split = self._split.cast_column(column, dataclasses.replace(feature, decode=False))
        self.names = [f"row {index}" for index in range(len(split))]

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> Pair:
        row, name = self._split[index], self.names[index]
        degraded, target = (_decode_cell(row[side], f"{name}, {side}") for side in ("input", "target"))
        return check_pair(name, degraded, target)


def _decode_cell(cell: dict[str, Any] | None, name: str) -> Tensor:
    """A cell of an image column that is kept undecoded: the file's bytes, or the path to it."""
    if cell is None:
        raise ValueError(f"The picture of {name} is missing; remove that row.")
    if cell["bytes"] is None:
        return read_image(cell["path"])
    return decode_image(cell["bytes"], f"The picture of {name}")


def check_pair(name: str, degraded: Tensor, target: Tensor) -> Pair:
    if degraded.shape != target.shape:
        raise ValueError(
            f"Pair {name}: the input is {degraded.shape[2]}x{degraded.shape[1]} pixels but the target "
            f"{target.shape[2]}x{target.shape[1]}; both must have the same size."
        )
    return degraded, target


def check_pairs(pairs: PairSource, smallest_px: int, reason: str) -> None:
    """Read every pair once, before a run begins; the first 20 culprits are listed.

    Args:
        pairs: The pairs to check.
        smallest_px: Both sides of every picture must have at least this many pixels.
        reason: Why, for the message, e.g. "the training patch (--resolution)".

    Raises:
        ValueError: if pairs are unreadable, differ in size or are too small; it lists them.
    """
    culprits = []
    for index, name in enumerate(pairs.names):
        try:
            height, width = pairs[index][1].shape[-2:]
        except ValueError as error:
            culprits.append(str(error))
            continue
        if min(height, width) < smallest_px:
            culprits.append(f"Pair {name} is {width}x{height} pixels, smaller than the {smallest_px} of {reason}.")
    if culprits:
        raise ValueError(some_sentences(culprits))


class PairSubset:
    """Some of the pairs of another source, by index."""

    def __init__(self, pairs: PairSource, indices: Sequence[int]) -> None:
        self.names = [pairs.names[index] for index in indices]
        self._pairs = pairs
        self._indices = list(indices)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Pair:
        return self._pairs[self._indices[index]]


def draw_pairs(pairs: PairSource, count: int, seed: int) -> tuple[PairSubset, PairSubset]:
    """`count` pairs drawn by the seed (never the first ones: names sort by camera or scene), and the others.

    Raises:
        ValueError: if there are fewer than `count`, or `count` is less than 1.
    """
    if not 0 < count <= len(pairs):
        raise ValueError(
            f"Cannot draw {count} training pairs from {len(pairs)}: the number to train on (`count`, "
            f"--max_train_samples) must be between 1 and {len(pairs)}."
        )
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    return PairSubset(pairs, sorted(order[:count])), PairSubset(pairs, sorted(order[count:]))
