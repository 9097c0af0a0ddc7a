"""How many steps CoLoRA needs for what PEFT's LoRA reaches: a comparison with shorter runs, in a folder of their own.

    python -m examples.experiments.methods.steps --folder path/to/cells --shorter path/to/cells/of/shorter/runs

Both folders are of `examples.experiments.methods.run`, the second with a lower --max_train_steps. Prints the table.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from colora_peft.utils import flag, run_script
from examples.experiments.grid.cells import Cell
from examples.experiments.grid.results import (
    Results,
    difference,
    over_tasks,
    results_of,
    without_largest,
)
from examples.experiments.grid.tuned import CELLS_FILE, SETTINGS_FILE
from examples.experiments.methods.plan import BUDGET, COLORA_DEFAULT, PEFT_LORA
from examples.experiments.methods.report import check_names
from examples.experiments.methods.results import SETTINGS, values_in
from examples.experiments.tables import markdown_table


@dataclass(kw_only=True)
class StepsArguments:
    """Flags of the table."""

    folder: str = flag(help="Folder with the cells of PEFT's LoRA and of CoLoRA at its default rate.")
    shorter: str = flag(help="Folder with the cells of CoLoRA at its default rate, of fewer steps.")


def read_results(folder: Path) -> tuple[list[Cell], Results, int]:
    """Cells of a folder, their results, and the number of steps of its runs."""
    cells, settings = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (CELLS_FILE, SETTINGS_FILE))
    return cells, results_of(cells, SETTINGS, settings["tuning_seed"]), settings["max_train_steps"]


def steps_table(folder: Path, shorter: Path) -> str:
    """Markdown: mean over the tasks of CoLoRA minus PEFT's LoRA after all steps, for CoLoRA after fewer.

    Raises:
        ValueError: The folders share no task on which all were run, have cells of one method with two losses, or the
            shorter runs are of several numbers of pairs or networks.
    """
    (cells, results, steps), (short_cells, short, fewer) = read_results(folder), read_results(shorter)
    check_names([*cells, *short_cells])
    lines = []
    tasks, *others = (values_in(short, name) for name in ("task", "train_pairs", "network"))
    if any(len(values) != 1 for values in others):
        raise ValueError(f"{shorter} has cells of {others}: it takes those of one number of pairs and one network.")
    (pairs,), (network,) = others
    tuned, default = ((pairs, network, method, BUDGET) for method in (PEFT_LORA, COLORA_DEFAULT))
    tasks = [
        task for task in tasks if {(task, *tuned), (task, *default)} <= results.keys() and (task, *default) in short
    ]
    if not tasks:
        raise ValueError(f"{shorter} has no task that {folder} has with {PEFT_LORA} and {COLORA_DEFAULT}.")
    for own, count in ((results, steps), (short, fewer)):
        found = [
            difference({(0,): own[(task, *default)], (1,): results[(task, *tuned)]}, (0,), (1,)) for task in tasks
        ]
        psnr = mean(
            mean(value for seed, value in own[(task, *default)].psnr.items() if seed in results[(task, *tuned)].psnr)
            for task in tasks
        )
        lines.append([count, f"{count / steps:.0%}", f"{psnr:.2f}", over_tasks(found), without_largest(found)])
    heads = ["steps of CoLoRA", "of those of PEFT's LoRA", "PSNR (dB)", "minus PEFT's LoRA", "without the largest"]
    return markdown_table(heads, lines)


def main(args: StepsArguments) -> None:
    print(steps_table(Path(args.folder), Path(args.shorter)))


if __name__ == "__main__":
    run_script(main, StepsArguments)
