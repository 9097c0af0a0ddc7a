"""Pairs of degraded and clean images, from folders and Hugging Face datasets.

Images are float32 RGB (3, H, W) in [0, 1].
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from colora_peft.images import as_float, is_turned, left_out_in_words, why_turned
from colora_peft.utils import NamePattern, match_names, some_sentences

from .hub_columns import check_not_empty, column_lines, read_cell, undecoded
from .sides import check_no_orphans, find_sides
from .sources import ImageFiles, digest_of_lines

Pair = tuple[Tensor, Tensor]  # degraded input and clean target of one size


class PairSource(Protocol):
    """Degraded and clean images of the same scene and size, by index; `names` tells users which is which.

    A source may have a `digest`, as `ImageSource` has, and `scenes`: the number of the target of each pair, where
    several pairs share one.
    """

    names: Sequence[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair: ...


class PairedImageFolder:
    """Pairs in a folder: in `input/` and `target/` below it or, where patterns tell them apart, side by side.

    `colora_peft.utils.names` says what patterns are. The suffixes of two files of a pair may differ, and where no name
    fits to the letter upper and lower case and the Unicode form, too.

    Args:
        folder: The folder.
        input_pattern: Pattern of the names of inputs without suffix. With a `*` a target may have several inputs.
        target_pattern: Pattern of the names of targets.

    Attributes:
        names: Names of the inputs, sorted.
        scenes: Number of the target of each pair, which several inputs may share.
        left_out: Sentence on the files that are no images; "" where there are none.

    Raises:
        FileNotFoundError: A folder is missing.
        ValueError: A folder is empty, a name has no partner (the first 20 are listed), or several names fit where one
            must.
    """

    def __init__(self, folder: str | Path, input_pattern: str = "{}", target_pattern: str = "{}") -> None:
        patterns = NamePattern(input_pattern, "--input_pattern"), NamePattern(target_pattern, "--target_pattern")
        left_out: Counter[str] = Counter()
        inputs, targets = find_sides(Path(folder), *patterns, left_out)
        self.left_out = left_out_in_words(left_out)
        try:
            partners = match_names(list(inputs), list(targets), *patterns)
        except ValueError as error:
            raise ValueError(f"In {folder}: {error}") from error
        check_no_orphans(Path(folder), list(inputs), list(targets), partners, patterns)
        self.names = sorted(inputs)
        by_number = list(dict.fromkeys(partners[name] for name in self.names))
        number_of = {target: number for number, target in enumerate(by_number)}
        self.scenes = [number_of[partners[name]] for name in self.names]
        self._inputs = ImageFiles([inputs[name] for name in self.names])
        self._targets = ImageFiles([targets[name] for name in by_number])

    @property
    def digest(self) -> str:
        sides = f"{self._inputs.digest} and {self._targets.digest}"
        shared = map(str, self.scenes) if len(self._targets) < len(self) else ()
        return digest_of_lines(f"{len(self)} pairs", (sides, *shared))

    def files(self, index: int) -> tuple[Path, Path]:
        """Returns the files of a pair."""
        return self._inputs.paths[index], self._targets.paths[self.scenes[index]]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Pair:
        degraded, target = self.stored(index)
        return as_float(degraded), as_float(target)

    def stored(self, index: int) -> Pair:
        """Returns a pair as it is stored, uint8 where its files have 8 bits: in a quarter of the memory."""
        degraded, target = self._inputs[index], self._targets[self.scenes[index]]
        return check_pair(self.names[index], degraded, target, *self.files(index))


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
        self.digest = digest_of_lines(f"{len(split)} pairs", lines)

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
        return check_pair(name, degraded, target, *(_file_of(row[side]) for side in ("input", "target")))


def _file_of(cell: dict[str, Any]) -> Path | io.BytesIO:
    """Returns what tells the orientation of the image in a cell; of an address nothing does."""
    return io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else Path(cell["path"])


def check_pair(name: str, degraded: Tensor, target: Tensor, *files: Path | io.BytesIO) -> Pair:
    """Returns the pair, or raises ValueError where its images differ in size; the files may tell why."""
    if degraded.shape != target.shape:
        why = why_turned(degraded, target, *(is_turned(file) for file in files)) if files else ""
        raise ValueError(
            f"Pair {name}: the input is {degraded.shape[2]}x{degraded.shape[1]} pixels but the target "
            f"{target.shape[2]}x{target.shape[1]}{why}; both must have the same size."
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
        self.scenes = [_scenes_of(pairs)[index] for index in indices]
        self._pairs = pairs
        self._indices = list(indices)

    @property
    def digest(self) -> str | None:
        whole = getattr(self._pairs, "digest", None)
        return whole and digest_of_lines(f"{len(self)} pairs", (whole, *map(str, self._indices)))

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


def _scenes_of(pairs: PairSource) -> Sequence[int]:
    return getattr(pairs, "scenes", range(len(pairs)))


def count_in_words(pairs: PairSource) -> str:
    """Returns "30 pairs" or, where targets have several inputs, "90 inputs of 30 targets"."""
    targets = len(set(_scenes_of(pairs)))
    return f"{len(pairs)} pairs" if targets == len(pairs) else f"{len(pairs)} inputs of {targets} targets"


def hold_out_pairs(pairs: PairSource, one_in: int, seed: int) -> tuple[PairSubset, PairSubset]:
    """Returns the pairs of one in so many targets, at least one, drawn by the seed, and the others.

    All inputs of a target are on one side: a network that was trained on one of them knows the others.

    Raises:
        ValueError: There is one target alone.
    """
    scenes = _scenes_of(pairs)
    known = list(dict.fromkeys(scenes))
    if len(known) < 2:
        raise ValueError("One pair cannot be split for evaluation; give a separate --eval_dir.")
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed)).tolist()
    drawn = {known[number] for number in order[: max(1, len(known) // one_in)]}
    held_out, others = ([index for index in range(len(pairs)) if (scenes[index] in drawn) == side]
                        for side in (True, False))  # fmt: skip
    return PairSubset(pairs, held_out), PairSubset(pairs, others)
