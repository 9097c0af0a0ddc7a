"""Grids in which every method is tuned alike.

The learning rate of a method is the best on pairs held out of the training folder, with a seed of its own
(--tuning_seed); what is reported are the other seeds at that rate, on the test folder, which is touched by them alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from grid_cells import Cell, CellFile, PairCentres, split_pairs

from colora_peft.data import PairedImageFolder, PairedPatches, PairSource, draw_pairs
from colora_peft.training import DataFailed, TrainingDiverged
from colora_peft.utils import write_json

MIN_TUNING_PAIRS = 4
"""A learning rate that was chosen on fewer says nothing."""
CELLS_FILE, SETTINGS_FILE = "cells.json", "settings.json"


class TuningArguments(Protocol):
    """What a grid's flags say about tuning."""

    learning_rates: list[float]
    tuning_seed: int
    seeds: list[int]


class Variant(Protocol):
    """What is compared, on one task: a named tuple of the settings that make it."""

    def settings(self) -> Cell:
        """Those that it has."""
        ...

    def _asdict(self) -> Cell:
        """All; None for those that it does not have."""
        ...


V = TypeVar("V", bound=Variant)


class Draw(NamedTuple):
    """What a task and a seed decide."""

    patches: PairedPatches
    evaluated: PairSource
    """The test folder; for the tuning seed, pairs held out of the training folder."""


class DrawArguments(TuningArguments, Protocol):
    """And on pairs."""

    resolution: int
    validation_pairs: int
    evaluated_size: int


def draw(args: DrawArguments, train_dir: str, train_pairs: int, seed: int) -> Draw:
    """Pairs of a folder TASK/train, drawn by the seed. To tune on, as many as the held-out ones leave.

    Raises:
        ValueError: The folder holds too few pairs.
        FileNotFoundError: There is no folder TASK/test beside it.
    """
    pairs, test = PairedImageFolder(train_dir), PairedImageFolder(Path(train_dir).parent / "test")
    is_tuning, count = seed == args.tuning_seed, len(pairs)
    if train_pairs > count or (is_tuning and args.validation_pairs + MIN_TUNING_PAIRS > count):
        raise ValueError(
            f"{train_dir} holds {count} pairs, too few to train on {train_pairs}"
            + (f" and to hold {args.validation_pairs} out for the rates (--validation_pairs)." if is_tuning else ".")
        )
    held_out = args.validation_pairs if is_tuning else min(args.validation_pairs, count - train_pairs)
    if held_out:
        chosen, validation = split_pairs(train_dir, min(train_pairs, count - held_out), held_out, seed, "drawn")
    else:
        chosen, validation = draw_pairs(pairs, train_pairs, seed)
    evaluated = validation if is_tuning else test
    return Draw(PairedPatches(chosen, args.resolution, seed), PairCentres(evaluated, args.evaluated_size))


def check_same_settings(folder: str | Path, own: Cell) -> None:
    """Write what all cells of a grid share beside them, or refuse a folder of cells made with other settings.

    Raises:
        ValueError: It holds such; names the setting.
    """
    path = Path(folder) / SETTINGS_FILE
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, own)
    found = json.loads(path.read_text(encoding="utf-8"))
    for name in {**found, **own}:
        if found.get(name) != own.get(name):
            raise ValueError(
                f"--output_dir {folder} has cells with {name} {found.get(name)}, not {own.get(name)}: choose another."
            )


def chosen_rate(tuning: list[Cell]) -> float | None:
    """The learning rate of the best cell on held-out pairs, all being of one variant and seed; None if all failed."""
    done = [cell for cell in tuning if "psnr" in cell]
    return max(done, key=lambda cell: cell["psnr"])["learning_rate"] if done else None


class TunedGrid(NamedTuple):
    """Runs variants: the learning rates with the tuning seed, then the other seeds at the best."""

    args: TuningArguments
    file: CellFile
    tuned_as: Callable[[V], V]
    """The variant whose learning rate another takes."""
    run_cell: Callable[[V, float, int], Cell]
    """What came of a variant at a learning rate and a seed."""
    identity: Callable[[V], Cell] = lambda variant: {}
    """What else makes a cell the same: fingerprints of what the names in a variant stand for."""
    retry_failed: bool = False
    """Whether cells that failed, if only for want of memory, are run again."""

    def run(self, variants: Sequence[V]) -> None:
        """Variant by variant, seed by seed; what the file holds is not run again."""
        for variant in variants:
            tuned = self.tuned_as(variant)
            tuning = [self.cell(tuned, rate, self.args.tuning_seed) for rate in self.args.learning_rates]
            best = chosen_rate(tuning)
            if best is None:
                print(f"{variant}: left out, as every learning rate failed.", flush=True)
                continue
            for seed in self.args.seeds:
                self.cell(variant, best, seed)

    def cell(self, variant: V, rate: float, seed: int) -> Cell:
        """The cell, from the file or run now. A run that fails is a cell that says so under `failed`."""
        settings = {**variant.settings(), **self.identity(variant), "learning_rate": rate, "seed": seed}
        found = cell = self.file.find({**variant._asdict(), **settings})
        if cell is None or ("failed" in cell and self.retry_failed):
            started = time.perf_counter()
            try:
                cell = {**settings, **self.run_cell(variant, rate, seed)}
            except DataFailed:  # says nothing about the settings
                raise
            # Whatever it is (a budget below the first rank, a full memory): the others still run, the report says so.
            except (TrainingDiverged, ValueError, RuntimeError) as error:
                cell = {**settings, "failed": str(error)}
            self.file.add(cell, in_place_of=found)
            text = ", ".join(f"{value}" for value in variant.settings().values())
            outcome = cell["failed"] if "failed" in cell else f"{cell['psnr']:.2f} dB"
            print(f"{text}, {rate:g}, seed {seed}: {outcome} ({time.perf_counter() - started:.0f} s)", flush=True)
        return cell
