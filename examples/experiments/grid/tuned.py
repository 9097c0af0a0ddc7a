"""Grids in which every method is tuned alike, but those that have a learning rate of their own.

The learning rate of a method is the best on pairs held out of the training folder, with a seed of its own
(--tuning_seed). The other seeds run at that rate; they alone touch the test folder, and they alone are reported.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from colora_peft import CoLoRAConfig
from colora_peft.data import PairedImageFolder, PairedPatches, PairSource, draw_pairs
from colora_peft.evaluation import SSIM_WINDOW_PX
from colora_peft.training import DataFailed, TrainingDiverged
from colora_peft.tuner import adapter_scaling
from colora_peft.utils import check_at_least, flag, write_json
from examples.experiments.grid.cells import Cell, CellFile, GridArguments, PairCentres, split_pairs

MIN_TUNING_PAIRS = 4
"""Smallest number of pairs to train on while learning rates are tried."""
CELLS_FILE, SETTINGS_FILE, REPORT_FILE = "cells.json", "settings.json", "report.md"

V = TypeVar("V", bound=tuple)
"""A variant: a named tuple of the settings that make it, None for those that it does not have."""


@dataclass(kw_only=True)
class TunedArguments(GridArguments):
    """Flags of a tuned grid."""

    tuning_seed: int = flag(100, "Seed that draws pairs, patches and adapters while learning rates are tried.")
    evaluated_size: int = flag(256, "Side in pixels of the image centres that quality is measured on.")

    def __post_init__(self) -> None:
        check_at_least(self, "evaluated_size", SSIM_WINDOW_PX)
        if self.tuning_seed in self.seeds:
            raise ValueError(f"--tuning_seed {self.tuning_seed} is one of --seeds: choose another.")


class Draw(NamedTuple):
    """The pairs that a task and a seed decide."""

    patches: PairedPatches
    evaluated: PairSource
    """The test folder; for the tuning seed, pairs held out of the training folder."""


def draw(args: TunedArguments, train_dir: str, train_pairs: int, seed: int) -> Draw:
    """Draws pairs of a folder TASK/train by the seed; for the tuning seed, as many as the held-out ones leave.

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


def method_settings() -> Cell:
    """Settings of the method that all cells of a grid share."""
    return {
        "beta": CoLoRAConfig.beta,
        "colora_alpha": CoLoRAConfig.colora_alpha,
        "scaling": [adapter_scaling(*shape, CoLoRAConfig.colora_alpha) for shape in ((1, 64, 144), (64, 64, 144))],
    }


def check_same_settings(folder: str | Path, own: Cell) -> None:
    """Writes the settings that all cells of a grid share beside them, or refuses a folder of other settings.

    Raises:
        ValueError: The folder has cells of other settings; names the setting.
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
    """The learning rate of the best of these cells, all of one variant and seed; None if all failed."""
    done = [cell for cell in tuning if "psnr" in cell]
    return max(done, key=lambda cell: cell["psnr"])["learning_rate"] if done else None


def settings_of(variant: Any) -> Cell:
    """The settings that a variant has."""
    return {name: value for name, value in variant._asdict().items() if value is not None}


class TunedGrid(NamedTuple):
    """Runs variants: all learning rates with the tuning seed, then the other seeds at the best."""

    args: TunedArguments
    file: CellFile
    tuned_as: Callable[[V], V]
    """Returns the variant whose learning rate another takes."""
    run_cell: Callable[[V, float, int], Cell]
    """Runs a variant at a learning rate and a seed."""
    identity: Callable[[V], Cell] = lambda variant: {}
    """Returns fingerprints of the networks and digests of the data of a variant: they make a cell the same, too."""
    retry_failed: bool = False
    """Whether cells that failed, if only for want of memory, are run again."""
    fixed_rate: Callable[[V], float | None] = lambda variant: None
    """Returns the learning rate of a variant for which none is chosen."""
    own_rates: Callable[[V], Sequence[float] | None] = lambda variant: None
    """Returns the learning rates to try for a variant, if they are not those of the flags."""

    def run(self, variants: Sequence[V]) -> None:
        """Runs variant by variant and seed by seed the cells that the file lacks."""
        for variant in variants:
            best = self.fixed_rate(variant)
            if best is None:
                best = self._tune(self.tuned_as(variant))
            if best is None:
                print(f"{variant}: left out, as every learning rate failed.", flush=True)
                continue
            for seed in self.args.seeds:
                self.cell(variant, best, seed)

    def _tune(self, variant: V) -> float | None:
        """The best learning rate of a variant, of those of the flags and of calls before; None if all fail."""
        for rate in self.own_rates(variant) or self.args.learning_rates:
            self.cell(variant, rate, self.args.tuning_seed)
        settings = {**variant._asdict(), **self.identity(variant), "seed": self.args.tuning_seed}
        return chosen_rate(self.file.find_all(settings))

    def cell(self, variant: V, rate: float, seed: int) -> Cell:
        """The cell, from the file or run now. A run that fails is a cell with its error under `failed`."""
        settings = {**settings_of(variant), **self.identity(variant), "learning_rate": rate, "seed": seed}
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
            text = ", ".join(f"{value}" for value in settings_of(variant).values())
            outcome = cell["failed"] if "failed" in cell else f"{cell['psnr']:.2f} dB"
            print(f"{text}, {rate:g}, seed {seed}: {outcome} ({time.perf_counter() - started:.0f} s)", flush=True)
        return cell
