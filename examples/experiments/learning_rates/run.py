"""Finds the learning rate of each fine-tuning method on training pairs alone.

    python -m examples.experiments.learning_rates.run --train_dir path/to/underwater/train

Some pairs of the folder are drawn for training, others validate; a test split is never touched. Every cell is a whole
run of `finetune.py`'s loop. Cells are kept in one JSON file and not run again, so the grid can grow over many calls;
each call ends by writing the report.
"""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Literal

from accelerate import Accelerator
from accelerate.utils import set_seed

from colora_peft import CoLoRAConfig
from colora_peft.data import PairedPatches
from colora_peft.training import METHODS, prepare_for_tuning, use_all_cores
from colora_peft.utils import write_text
from examples.experiments.grid.cells import (
    Cell,
    CellFile,
    NetworkArguments,
    cell_settings,
    load_network,
    measure_contributions,
    own_part,
    run_arguments,
    split_pairs,
    train_and_validate,
)
from examples.experiments.script import run_script
from examples.experiments.tables import markdown_table


@dataclass(kw_only=True)
class SearchArguments(NetworkArguments):
    """Flags of the search."""

    train_dir: str = field(metadata={"help": "Folder with input/ and target/; more pairs than --train_pairs."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Methods to run."})
    learning_rates: list[float] = field(
        default_factory=lambda: [3e-4, 1e-3, 3e-3], metadata={"help": "Learning rates to run with each method."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1], metadata={"help": "Seeds that draw pairs, patches and adapters."}
    )
    beta: float = field(default=CoLoRAConfig.beta, metadata={"help": "Exponent from contribution to rank (colora)."})
    colora_alpha: float = field(default=CoLoRAConfig.colora_alpha, metadata={"help": "Gain of the adapters."})
    parameter_budget: float = field(default=0.07, metadata={"help": "Trained share of the adapted weights."})
    max_train_steps: int = field(default=500, metadata={"help": "Number of training steps of each cell."})
    resolution: int = field(default=128, metadata={"help": "Side of the square training patches in pixels."})
    validation: Literal["block", "colours"] = field(
        default="block",
        metadata={"help": "block: neighbours in the list, another block for each seed, as if from the same place; "
                  "colours: the pairs whose colours are the strangest, as if from another place."},
    )  # fmt: skip
    results: str = field(
        default=str(Path(__file__).parent / "cells.json"),
        metadata={"help": "JSON file of the cells; the report lies beside it."},
    )


def settings_of(args: SearchArguments, method: str, learning_rate: float, seed: int) -> Cell:
    """All settings that decide a cell."""
    settings = cell_settings(args, args.train_dir, learning_rate, seed)
    settings |= {"method": method, "validation": args.validation}
    if method in ("colora", "lora"):
        settings |= {"colora_alpha": args.colora_alpha, "parameter_budget": args.parameter_budget}
    return settings | ({"beta": args.beta} if method == "colora" else {})


def run_cell(
    settings: Cell, args: SearchArguments, accelerator: Accelerator, scores: dict[int, dict[str, float]]
) -> Cell:
    """Train and validate once. `scores` keeps the contributions of each seed between cells."""
    seed, method = settings["seed"], settings["method"]
    set_seed(seed)
    chosen, validation = split_pairs(args.train_dir, args.train_pairs, args.validation_pairs, seed, args.validation)
    model = load_network(args.model_name_or_path, accelerator)
    with tempfile.TemporaryDirectory() as folder:
        run = run_arguments(args, folder, settings["learning_rate"], seed)
        patches = PairedPatches(chosen, run.resolution, seed)
        if method == "colora" and seed not in scores:
            scores[seed] = measure_contributions(model, patches, run, accelerator).scores
        config = CoLoRAConfig(
            contributions=scores[seed] if method == "colora" else None,
            parameter_budget=args.parameter_budget,
            beta=args.beta,
            colora_alpha=args.colora_alpha,
        )
        model = prepare_for_tuning(model, method, config)
        return train_and_validate(model, patches, validation, run, accelerator)


def report(cells: list[Cell]) -> str:
    """Markdown: a row for each method and setting, a column for each learning rate, means over the seeds."""
    rows: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        rows[row_name(cell)][cell["learning_rate"]].append(cell.get("psnr", math.nan))
    rates = sorted({rate for row in rows.values() for rate in row})
    lines = []
    for name, row in rows.items():
        means = {rate: mean(values) for rate, values in row.items()}
        best = max((value for value in means.values() if not math.isnan(value)), default=0.0)
        shown = {rate: f"{value:.2f} ({len(row[rate])})" for rate, value in means.items()}
        shown |= {rate: f"**{shown[rate]}**" for rate, value in means.items() if value == best}
        lines.append([name, *(shown.get(rate, "") for rate in rates)])
    table = markdown_table(["dB at learning rate", *(f"{rate:g}" for rate in rates)], lines)
    return f"Mean validation PSNR over the seeds (number of seeds); the best of each row is bold.\n\n{table}\n"


def row_name(cell: Cell) -> str:
    """The settings that make a row of the report."""
    patches = f"{cell['per_device_train_batch_size']} x {cell['resolution']}"
    name = f"{cell['task']}, {cell['method']}, {cell['train_pairs']} pairs"
    name += f", {cell['max_train_steps']} steps of {patches}, on {cell['validation']}"
    if "colora_alpha" in cell:
        name += f", {cell['parameter_budget']:.1%}, alpha {cell['colora_alpha']:g}"
    return f"{name}, beta {cell['beta']:g}" if "beta" in cell else name


def main(args: SearchArguments) -> None:
    """Run the cells that the file lacks and write the report of all."""
    accelerator = Accelerator()
    use_all_cores(accelerator)
    file = CellFile(args.results)
    grid = [settings_of(args, method, rate, seed)
            for seed, method, rate in product(args.seeds, args.methods, args.learning_rates)]  # fmt: skip
    file.run_missing(own_part(grid, args.part), partial(run_cell, args=args, accelerator=accelerator, scores={}))
    text = report(file.cells)
    write_text(file.path.with_name("report.md"), text)
    print(f"\n{text}")


if __name__ == "__main__":
    run_script(main, SearchArguments)
