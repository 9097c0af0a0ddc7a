"""Pairs of degraded and clean images, from folders and Hugging Face datasets.

Images are float32 RGB (3, H, W) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from colora_peft.images import as_float, list_images
from colora_peft.utils import some, some_sentences

from .hub_columns import check_not_empty, column_lines, read_cell, undecoded
from .sources import ImageFiles, fingerprint_of

Pair = tuple[Tensor, Tensor]  # degraded input and clean target of one size


class PairSource(Protocol):
    """Degraded and clean images of the same scene and size, by index; `names` tells users which is which.

    A source may have a `fingerprint`, as `ImageSource` has.
    """

    names: Sequence[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair: ...


class PairedImageFolder:
    """Pairs in the folders `input/` and `target/`, of equal file names (the suffix may differ).

    Raises:
        FileNotFoundError: A folder is missing.
        ValueError: A folder is empty, a name has no partner (the first 20 are listed) or two files share a name.
    """

    def __init__(self, folder: str | Path) -> None:
        inputs, targets = (_by_stem(side) for side in _sides(Path(folder)))
        orphans = sorted(inputs.keys() ^ targets.keys())
        if orphans:
            sides = [f"{name} (only in {'input' if name in inputs else 'target'})" for name in orphans]
            raise ValueError(
                f"In {folder} these images have no partner of the same name: {some(sides)}. Add the missing ones, "
                "rename them or remove these."
            )
        self.names = sorted(inputs)
        self._inputs = ImageFiles([inputs[name] for name in self.names])
        self._targets = ImageFiles([targets[name] for name in self.names])

    @property
    def fingerprint(self) -> str:
        sides = f"{self._inputs.fingerprint} and {self._targets.fingerprint}"
        return fingerprint_of(f"{len(self)} pairs", (sides,))

    def files(self, index: int) -> tuple[Path, Path]:
        """Returns the files of a pair."""
        return self._inputs.paths[index], self._targets.paths[index]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Pair:
        degraded, target = self.stored(index)
        return as_float(degraded), as_float(target)

    def stored(self, index: int) -> Pair:
        """Returns a pair as it is stored, uint8 where its files have 8 bits: in a quarter of the memory."""
        return check_pair(self.names[index], self._inputs[index], self._targets[index])


def _sides(folder: Path) -> tuple[Path, Path]:
    sides = (folder / "input", folder / "target")
    for needed in (folder, *sides):
        if not needed.is_dir():
            raise FileNotFoundError(
                f"There is no folder {needed}; check the path. Pairs are read from a folder that holds `input/` and "
                "`target/` with images of the same file names."
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
    """Pairs in a Hugging Face dataset split with the image columns `input` and `target`.

    Raises:
        ValueError: A column is missing or does not hold images, or the split is empty.
    """

    def __init__(self, split: Any) -> None:
        missing = {"input", "target"} - set(split.column_names)
        if missing:
            raise ValueError(
                f"The dataset has the columns {split.column_names}; rename yours to `input` and `target` "
                f"(missing: {', '.join(sorted(missing))})."
            )
        check_not_empty(split)
        self._split = undecoded(undecoded(split.with_format(None), "input"), "target")
        self.names = [f"row {index}" for index in range(len(split))]
        lines = (line for side in ("input", "target") for line in column_lines(split, side))
        self.fingerprint = fingerprint_of(f"{len(split)} pairs", lines)

    def files(self, index: int) -> list[str | bytes | None]:
        """Returns the files of a pair: their content, or the paths or addresses where they lie."""
        row = self._split[index]
        return [row[side] and (row[side]["bytes"] or row[side]["path"]) for side in ("input", "target")]

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> Pair:
        degraded, target = self.stored(index)
        return as_float(degraded), as_float(target)

    def stored(self, index: int) -> Pair:
        """Returns a pair as it is stored, uint8 where its files have 8 bits: in a quarter of the memory."""
        row, name = self._split[index], self.names[index]
        degraded, target = (read_cell(row[side], f"{name}, {side}") for side in ("input", "target"))
        return check_pair(name, degraded, target)


def check_pair(name: str, degraded: Tensor, target: Tensor) -> Pair:
    """Returns the pair, or raises ValueError where its images differ in size."""
    if degraded.shape != target.shape:
        raise ValueError(
            f"Pair {name}: the input is {degraded.shape[2]}x{degraded.shape[1]} pixels but the target "
            f"{target.shape[2]}x{target.shape[1]}; both must have the same size."
        )
    return degraded, target


def stored_pair(pairs: PairSource, index: int) -> Pair:
    """Returns a pair as it is stored, uint8 or float, where the source can give it so."""
    return pairs.stored(index) if hasattr(pairs, "stored") else pairs[index]


def check_pairs(pairs: PairSource, smallest_px: int, reason: str) -> None:
    """Reads every pair once, before a run begins.

    Args:
        pairs: The pairs to check.
        smallest_px: Least number of pixels of both sides of every image.
        reason: Reason for that number, for the message, e.g. "the training patch (--resolution)".

    Raises:
        ValueError: Pairs are unreadable, differ in size or are too small; the first 20 are listed.
    """
    culprits = []
    for index, name in enumerate(pairs.names):
        try:
            height, width = stored_pair(pairs, index)[1].shape[-2:]
        except ValueError as error:
            culprits.append(str(error))
            continue
        if min(height, width) < smallest_px:
            culprits.append(f"Pair {name} is {width}x{height} pixels, smaller than the {smallest_px} of {reason}.")
    if culprits:
        raise ValueError(some_sentences(culprits))


class PairSubset:
    """Part of the pairs of another source, by index."""

    def __init__(self, pairs: PairSource, indices: Sequence[int]) -> None:
        self.names = [pairs.names[index] for index in indices]
        self._pairs = pairs
        self._indices = list(indices)

    @property
    def fingerprint(self) -> str | None:
        whole = getattr(self._pairs, "fingerprint", None)
        return whole and fingerprint_of(f"{len(self)} pairs", (whole, *map(str, self._indices)))

    def files(self, index: int) -> Sequence[str | Path | bytes | None]:
        """Returns the files of a pair as far as the other source knows them."""
        of_whole = getattr(self._pairs, "files", None)
        return (None, None) if of_whole is None else of_whole(self._indices[index])

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Pair:
        return self._pairs[self._indices[index]]

    def stored(self, index: int) -> Pair:
        """Returns a pair as it is stored, if the other source can give it so."""
        return stored_pair(self._pairs, self._indices[index])


def draw_pairs(pairs: PairSource, count: int, seed: int) -> tuple[PairSubset, PairSubset]:
    """Returns `count` pairs drawn by the seed, and the others. (The first ones would be of one camera or scene.)

    Raises:
        ValueError: There are fewer than `count`, or `count` is less than 1.
    """
    if not 0 < count <= len(pairs):
        raise ValueError(
            f"Cannot draw {count} training pairs from {len(pairs)}: the number to train on (`count`, "
            f"--max_train_samples) must be between 1 and {len(pairs)}."
        )
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    return PairSubset(pairs, sorted(order[:count])), PairSubset(pairs, sorted(order[count:]))
