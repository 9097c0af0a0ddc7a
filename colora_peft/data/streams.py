"""Clean images one after another: a streaming Hugging Face dataset of any size as training data of PROD.

A stream has no length and no way back, so it is read in *blocks*. The law, all of it a function of (seed, epoch) and
the number of processes:

- Order: an epoch reads the shards in an order drawn by (seed, epoch). With at least as many shards as processes, each
  process reads every `world_size`-th of them; with fewer, each reads all and keeps every `world_size`-th image. A
  process permutes the images of a block among themselves, and begins its next epoch where its share ends, so that
  all processes make equally many steps.
- Sample: crop and degradations of an image depend on (seed, epoch, shard, row) alone, not on who draws it when.
- Position: (epoch, shard, row) of the first image of the block, and how many of the block are done. A resumed run
  opens that shard, skips to the row and reads the block again: nothing else has to be kept.

The process itself reads the undecoded files, one block ahead, and hands each with its position to whoever makes the
sample: workers share the decoding and degrading, and their number changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, Sampler

from colora_peft.prod import RandomOrderDegradation

from .hub_columns import check_column, read_cell, undecoded
from .patches import Position, Sample, StepSampler, degraded_sample, sample_generator
from .sources import Candidate, digest_of_lines, first_usable

_MOST_SHARDS = 4096  # a folder has a shard for each file; so many of them are read as one that no more are left
_SPARES = 8  # images of a block that may replace one that cannot be used
_MOST_EMPTY_EPOCHS = 64  # in a row; where shards are empty, a process may get none but them in some epoch
_BEGINNING: Position = [0, 0, 0, 0]  # epoch, turn among the shards of the process, row, done in the block


class Cell(NamedTuple):
    """Image as the stream holds it, undecoded, and its place."""

    shard: int
    row: int
    content: dict[str, Any] | None

    @property
    def name(self) -> str:
        path = (self.content or {}).get("path")
        return f"row {self.row} of shard {self.shard}" + (f" ({path})" if path else "")


class Drawn(NamedTuple):
    """Image that becomes a sample, others of its block in case it cannot be used, and the process's position after."""

    epoch: int
    cell: Cell
    spares: list[Cell]
    position: Position


@dataclass(frozen=True)
class _Block:
    epoch: int
    start: tuple[int, int]  # turn and row of the first image
    cells: list[Cell]


class ImageStream:
    """Streaming dataset split with an image column.

    Args:
        split: A `datasets.IterableDataset`.
        column: Its image column.
        seed: Seed of the order.
        block_size: Number of images that are mixed with each other; memory holds twice as many, undecoded.

    Raises:
        ValueError: There is no such column, or it does not hold images.
    """

    def __init__(self, split: Any, column: str, seed: int, block_size: int) -> None:
        check_column(split.column_names, column)
        self._split = undecoded(split, column).select_columns(column)
        self._column = column
        self.seed = seed
        self.block_size = block_size
        self.num_shards = min(split.num_shards, _MOST_SHARDS)
        self.digest = digest_of_lines(
            f"a stream of clean pictures in {split.num_shards} shards", (str(split.features), column)
        )

    def check(self, resolution: int, rank: int, world_size: int) -> None:
        """Reads the first images of a process.

        Raises:
            ValueError: There is none for it, or none of them can be used.
        """
        block = next(self._blocks(_BEGINNING, rank, world_size, _SPARES))
        first_usable(map(_candidate, block.cells), resolution)

    def drawn(self, position: Position, rank: int, world_size: int) -> Iterator[Drawn]:
        """Yields the images of a process from `position` on, without end."""
        done = position[3]
        blocks = self._blocks(position, rank, world_size, self.block_size)
        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(next, blocks)
            while True:
                block, coming = coming.result(), reader.submit(next, blocks)
                yield from self._mixed(block, done)
                done = 0

    def _mixed(self, block: _Block, done: int) -> Iterator[Drawn]:
        generator = sample_generator(self.seed, block.epoch, block.cells[0].shard, block.cells[0].row)
        order = torch.randperm(len(block.cells), generator=generator).tolist()
        spares = [block.cells[place] for place in order[-_SPARES:]]
        for count, place in enumerate(order[done:], start=done + 1):
            yield Drawn(block.epoch, block.cells[place], spares, [block.epoch, *block.start, count])

    def _blocks(self, position: Position, rank: int, world_size: int, size: int) -> Iterator[_Block]:
        epoch, turn, row, _ = position
        empty_epochs = 0
        while empty_epochs < _MOST_EMPTY_EPOCHS:
            images = self._epoch(epoch, turn, row, rank, world_size)
            empty_epochs += 1
            while cells := list(islice(images, size)):
                first_turn, first = cells[0]
                yield _Block(epoch, (first_turn, first.row), [cell for _, cell in cells])
                empty_epochs = 0
            epoch, turn, row = epoch + 1, 0, 0
        raise ValueError(
            f"The dataset has no image for process {rank} of {world_size}: {empty_epochs} epochs in a row gave it "
            "none. Launch fewer processes, or name a split that has more."
        )

    def _epoch(self, epoch: int, turn: int, row: int, rank: int, world_size: int) -> Iterator[tuple[int, Cell]]:
        """Yields the images of a process from a row of the shard whose turn it is, each with the turn."""
        order = torch.randperm(self.num_shards, generator=sample_generator(self.seed, epoch)).tolist()
        whole_shards = self.num_shards >= world_size
        mine = order[rank::world_size] if whole_shards else order
        for this_turn in range(turn, len(mine)):
            shard = mine[this_turn]
            rows = self._split.shard(self.num_shards, shard)
            first = row if this_turn == turn else 0
            for number, content in enumerate(rows.skip(first) if first else rows, start=first):
                # Where shards are shared, processes start at different rows of each, or one would get all short ends.
                if whole_shards or (number + this_turn) % world_size == rank:
                    yield this_turn, Cell(shard, number, content[self._column])


def _candidate(cell: Cell) -> Candidate:
    return cell.name, partial(read_cell, cell.content, cell.name)


class StreamPatches(Dataset):
    """Patches of a stream, for what `StreamSampler` drew.

    Args:
        stream: The clean images.
        degradation: Draws a recipe for each.
        resolution: Side of the square patch in pixels.
        max_skipped_share: Share of the samples that may be replaced before training stops. The substitute is of the
            same block, chosen by (seed, epoch, shard, row).
        enlarged_share: Share of the patches that are enlarged after they were degraded, see `degraded_sample`.
    """

    def __init__(
        self,
        stream: ImageStream,
        degradation: RandomOrderDegradation,
        resolution: int,
        max_skipped_share: float = 0.0,
        enlarged_share: float = 0.0,
    ) -> None:
        self._seed = stream.seed
        self._stream = stream
        self.degradation = degradation
        self.resolution = resolution
        self.max_skipped_share = max_skipped_share
        self.enlarged_share = enlarged_share
        self.digest = stream.digest

    def __getitem__(self, drawn: Drawn) -> Sample:
        generator = sample_generator(self._seed, drawn.epoch, drawn.cell.shard, drawn.cell.row)
        candidates = map(_candidate, self._cells(drawn, generator))
        sample = degraded_sample(candidates, self.degradation, self.resolution, generator, self.enlarged_share)
        return {**sample, "position": drawn.position}

    def _cells(self, drawn: Drawn, generator: torch.Generator) -> Iterator[Cell]:
        yield drawn.cell
        for place in torch.randperm(len(drawn.spares), generator=generator).tolist():
            spare = drawn.spares[place]
            if (spare.shard, spare.row) != (drawn.cell.shard, drawn.cell.row):
                yield spare

    def sampler(self, steps: StepSampler, position: Position | None) -> Sampler:
        return StreamSampler(self._stream, steps, position or _BEGINNING)


class StreamSampler(Sampler[list[Drawn]]):
    """Draws of the stream for the steps of one process, from `position` on."""

    def __init__(self, stream: ImageStream, steps: StepSampler, position: Position) -> None:
        self.stream = stream
        self.steps = steps
        self.position = position

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[Drawn]]:
        drawn = self.stream.drawn(self.position, self.steps.rank, self.steps.world_size)
        for _ in range(len(self)):
            yield [next(drawn) for _ in range(self.steps.batch_size)]
        drawn.close()
