"""Compares pre-trained networks by what a short adaptation to real tasks makes of them.

    python -m examples.experiments.base.adapt --networks path/to/old path/to/new --tasks_dir path/to/tasks \
        --tasks rain noise underwater --output_dir outputs/base

Every cell is a launch of examples/finetune.py: a task, a draw of its training pairs, a network. All networks get the
same pairs, patches and settings. Cells are kept in adapt.json and not run again, so that the table grows over calls.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean

from tqdm.auto import tqdm

from colora_peft.utils import flag, run_script, write_json, write_text
from examples.experiments.grid.results import over_tasks, paired_difference
from examples.experiments.tables import markdown_table

FINETUNE = Path(__file__).parents[2] / "finetune.py"
Cell = dict[str, object]


@dataclass
class AdaptArguments:
    """Flags of the comparison."""

    networks: list[str] = flag(help="Folders or Hub ids of the networks, the reference first.")
    tasks_dir: str = flag(help="Folder whose folders TASK/train and TASK/test hold pairs.")
    tasks: list[str] = flag(help="Names of the tasks.")
    draws: int = flag(3, "Draws of training pairs for each task.")
    max_train_samples: int = flag(64, "Number of training pairs, where there are so many.")
    max_train_steps: int = flag(200, "Optimiser steps of each adaptation.")
    resolution: int = flag(128, "Side of the training patches in pixels.")
    per_device_train_batch_size: int = flag(4, "Patches a step.")
    parameter_budget: float = flag(0.07, "Trained share of the adapted weights.")
    output_dir: str = flag("outputs/base", "Folder for adapt.json and adapt.md.")

    def __post_init__(self) -> None:
        names = [Path(network).name for network in self.networks]
        if len(set(names)) < len(names):
            raise ValueError(f"--networks must have different names at their ends, got {', '.join(names)}.")

    def finetune_flags(self) -> Cell:
        """Flags that all cells share."""
        names = ("max_train_steps", "resolution", "per_device_train_batch_size", "parameter_budget")
        return {name: getattr(self, name) for name in names}


def cells(args: AdaptArguments) -> Iterator[tuple[Cell, str]]:
    """Settings of each cell and the path of its network; the networks of a task and a draw follow each other."""
    for draw, task, network in product(range(args.draws), args.tasks, args.networks):
        yield {"task": task, "draw": draw, "network": Path(network).name, **args.finetune_flags()}, network


def adapt(args: AdaptArguments, cell: Cell, network: str) -> Cell:
    """Runs one cell.

    Raises:
        ValueError: the run failed; it says why.
    """
    task_dir = Path(args.tasks_dir) / str(cell["task"])
    pairs = min(args.max_train_samples, len(list((task_dir / "train" / "target").iterdir())))
    flags = args.finetune_flags() | {
        "model_name_or_path": network,
        "train_dir": task_dir / "train",
        "eval_dir": task_dir / "test",
        "max_train_samples": pairs,
        "seed": cell["draw"],
        "checkpointing_steps": args.max_train_steps,
        "checkerboard_weight": 0,
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(FINETUNE), "--output_dir", folder]
        command += [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise ValueError(f"The adaptation {cell} failed: {done.stderr.strip().splitlines()[-1]}")
        metrics = json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))
    names = ("psnr_input", "psnr_before", "psnr_after", "ssim_after", "seconds", "learning_rate")
    return {**cell, "train_pairs": pairs, **{name: metrics[name] for name in names}}


def table(found: list[Cell]) -> str:
    """Mean PSNR by task and network, and the last network minus the first, in Markdown.

    The difference is paired by draw, with its standard error and the number of draws; those that not all networks
    have do not count.
    """
    networks = list(dict.fromkeys(cell["network"] for cell in found))
    cells = {(cell["task"], cell["draw"], cell["network"]): cell for cell in found}
    rows, differences = [], []
    for task in dict.fromkeys(cell["task"] for cell in found):
        draws = sorted({draw for other, draw, _ in cells if other == task})
        whole = [draw for draw in draws if all((task, draw, network) in cells for network in networks)]
        if not whole:
            continue
        own = [[cells[task, draw, network]["psnr_after"] for draw in whole] for network in networks]
        differences.append(paired_difference(own[-1], own[0]))
        inputs = mean(cells[task, draw, networks[0]]["psnr_input"] for draw in whole)
        rows.append((task, [inputs, *map(mean, own)], differences[-1]))
    if rows:
        columns = zip(*(figures for _, figures, _ in rows), strict=True)
        rows.append(("mean of the tasks", list(map(mean, columns)), over_tasks(differences)))
    lines = [[name, *(f"{figure:.2f}" for figure in figures), change] for name, figures, change in rows]
    return markdown_table(["task", "input", *networks, "last - first"], lines)


def report(found: list[Cell]) -> str:
    """The page of adapt.json, in Markdown."""
    return f"PSNR in dB of the test images after the adaptation.\n\n{table(found)}\n"


def main(args: AdaptArguments) -> None:
    path = Path(args.output_dir) / "adapt.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found: list[Cell] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    for cell, network in tqdm(list(cells(args)), desc="adaptations"):
        if any(cell.items() <= other.items() for other in found):
            continue
        found.append(adapt(args, cell, network))
        write_json(path, found)
    page = report(found)
    write_text(path.with_suffix(".md"), page)
    print(page)


if __name__ == "__main__":
    run_script(main, AdaptArguments)
