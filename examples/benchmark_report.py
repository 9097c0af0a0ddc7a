"""Tables of benchmark.py, from its cells."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean

from benchmark_plots import plot_over_pairs, plot_radar
from benchmark_variants import NONE, PEFT_LORA
from grid_cells import Cell
from grid_report import Key, Results, Settings, difference, over_tasks, results_of, spread
from tuned_grid import CELLS_FILE, SETTINGS_FILE

from colora_peft.files import write_text

SETTINGS = Settings(
    ("task", "train_pairs", "network", "method", "parameter_budget"),
    tuned_alike=("task", "network", "method", "parameter_budget"),
)

PICTURES_FOLDER = "pictures"
OLD_TASK = """Old task: PSNR on the clean test pictures, degraded as in the pre-training, after the tuning: with
the adapter switched off, so that the network is what it was; a network that was tuned itself forgets."""


def values_in(results: Results, name: str) -> list[object]:
    """The different values of a setting, in order of first appearance; new weights (NONE) last."""
    index = SETTINGS.names.index(name)
    found = [value for value in dict.fromkeys(key[index] for key in results) if value is not None]
    return sorted(found, key=lambda value: value == NONE)


def label(network: str, method: str, budget: float | None) -> str:
    """As the paper writes it."""
    return f"{network} + {method}{f' {budget:.3g}' if budget is not None else ''}"


def rows_of(results: Results) -> dict[str, Callable[[str, int], Key]]:
    """What is compared, by its label: the key of a task and a number of pairs."""
    rows = {}
    for _, _, network, method, budget in sorted(results, key=lambda key: key[2] == NONE):
        rows[label(network, method, budget)] = lambda task, pairs, rest=(network, method, budget): (task, pairs, *rest)
    return rows


def quality_table(results: Results, inputs: dict[str, float], tasks: list[str], pairs: int) -> str:
    """Markdown: test PSNR of each row and task, and the mean over the tasks where all have one."""
    lines = [f"| {pairs} pairs | {' | '.join(tasks)} | mean |", "|---" * (len(tasks) + 2) + "|"]
    shown = [f"{inputs[task]:.2f}" if task in inputs else "" for task in tasks]
    lines.append(f"| input | {' | '.join(shown)} | {mean(inputs[task] for task in tasks):.2f} |")
    for name, key_of in rows_of(results).items():
        found = [results.get(key_of(task, pairs)) for task in tasks]
        if any(found):
            average = f"{mean(mean(result.psnr.values()) for result in found):.2f}" if all(found) else ""
            lines.append(f"| {name} | {' | '.join(spread(r) if r else '' for r in found)} | {average} |")
    return "\n".join(lines)


def ssim_table(cells: list[Cell], tasks: list[str], pairs: int) -> str:
    """Markdown: test SSIM of each row and task, mean over the seeds."""
    found: dict[str, dict[str, list[float]]] = {}
    for cell in sorted((c for c in cells if c["train_pairs"] == pairs), key=lambda cell: cell["network"] == NONE):
        name = label(cell["network"], cell["method"], cell.get("parameter_budget"))
        found.setdefault(name, {}).setdefault(cell["task"], []).append(cell["ssim"])
    lines = [f"| SSIM, {pairs} pairs | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    inputs = {cell["task"]: f"{cell['ssim_input']:.3f}" for cell in cells}
    lines.append(f"| input | {' | '.join(inputs.get(task, '') for task in tasks)} |")
    for name, own in found.items():
        lines.append(f"| {name} | {' | '.join(f'{mean(own[t]):.3f}' if t in own else '' for t in tasks)} |")
    return "\n".join(lines)


def differences_table(results: Results, tasks: list[str], pairs: int) -> str:
    """Markdown: the paper's claims, as differences that are paired by seed."""
    first = values_in(results, "network")[0]
    others = [network for network in values_in(results, "network") if network != first]
    claims = {
        f"{first} less {other}, both tuned in full": ((first, "full", None), (other, "full", None)) for other in others
    }
    claims |= {f"{one} less {two}, both tuned in full": ((one, "full", None), (two, "full", None))
               for one, two in zip(others, others[1:], strict=False)}  # fmt: skip
    for budget in sorted(values_in(results, "parameter_budget"), reverse=True):
        colora = (first, "colora", budget)
        claims[f"CoLoRA {budget:g} less LoRA, the same budget"] = colora, (first, "lora", budget)
        claims[f"CoLoRA {budget:g} less PEFT's LoRA, the same budget"] = colora, (first, PEFT_LORA, budget)
        claims[f"CoLoRA {budget:g} less full tuning"] = colora, (first, "full", None)
    lines = [f"| dB, {pairs} pairs | {' | '.join(tasks)} | mean |", "|---" * (len(tasks) + 2) + "|"]
    for name, (one, other) in claims.items():
        found = [difference(results, (task, pairs, *one), (task, pairs, *other)) for task in tasks]
        if any(found):
            lines.append(f"| {name} | {' | '.join(str(d or '') for d in found)} | {over_tasks(found)} |")
    return "\n".join(lines)


def cost_table(cells: list[Cell]) -> str:
    """Markdown: what each way of tuning trains and takes; means over all its cells of the tasks that all ways have.

    On a CPU the peak is that of the process, with all that it had loaded before.
    """
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        if "psnr" in cell:
            name = label(cell["network"], cell["method"], cell.get("parameter_budget"))
            groups.setdefault(name, []).append(cell)
    # Another mean of tasks would be another task: what is forgotten is measured on each task's own pictures.
    shared = set.intersection(*({cell["task"] for cell in own} for own in groups.values()))
    if shared:
        groups = {name: [cell for cell in own if cell["task"] in shared] for name, own in groups.items()}
    columns = {
        "trained parameters": lambda own: f"{mean(cell['trainable_parameters'] for cell in own):,.0f}",
        "of the adaptable weights": lambda own: f"{mean(cell['trainable_ratio'] for cell in own):.2%}",
        "seconds of training": lambda own: f"{mean(cell['seconds'] for cell in own):.0f}",
        "and of contributions": lambda own: f"{mean(cell.get('seconds_contributions', 0.0) for cell in own):.1f}",
        "peak memory (GB)": peak_memory,
        "old task (dB)": old_task,
    }
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, own in groups.items():
        lines.append(f"| {name} | {' | '.join(column(own) for column in columns.values())} |")
    return "\n".join(lines)


def peak_memory(cells: list[Cell]) -> str:
    found = [cell["peak_memory_bytes"] for cell in cells if cell.get("peak_memory_bytes")]
    return f"{mean(found) / 1e9:.2f}" if found else ""


def old_task(cells: list[Cell]) -> str:
    """Mean PSNR on PROD's degradations after the tuning, adapters switched off."""
    found = [cell["psnr_old_task"] for cell in cells if "psnr_old_task" in cell]
    return f"{mean(found):.2f}" if found else ""


def check_names(cells: list[Cell]) -> None:
    """Refuse cells in which one name stands for two things.

    Raises:
        ValueError: Names the network or the task.
    """
    for name, what in (("network", "weights"), ("task", "data")):
        found: dict[object, object] = {}
        for cell in cells:
            if found.setdefault(cell[name], cell.get(what)) != cell.get(what):
                raise ValueError(
                    f"The {name} {cell[name]!r} was run with other {what} before: choose another --output_dir, or "
                    f"delete the cells of one from {CELLS_FILE}."
                )


def write_report(folder: Path) -> str:
    """Write README.md into `folder`; the text.

    Raises:
        FileNotFoundError: if no cell was run into it.
    """
    if not (folder / CELLS_FILE).is_file():
        raise FileNotFoundError(f"There are no cells in {folder} to report; run some first.")
    cells, settings = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (CELLS_FILE, SETTINGS_FILE))
    check_names(cells)
    results = results_of(cells, SETTINGS, settings["tuning_seed"])
    tested = [cell for cell in cells if cell["seed"] != settings["tuning_seed"] and "psnr" in cell]
    inputs = {cell["task"]: cell["psnr_input"] for cell in tested}
    tasks = values_in(results, "task")
    hardware = sorted({cell["hardware"] for cell in cells if "hardware" in cell})
    text = (
        "Test PSNR in dB, in RGB on [0, 1] after rounding to 8 bits, per picture, then averaged; mean ± standard "
        "deviation over the seeds (their number), at the learning rate that was best on held-out training pairs with "
        f"another seed (edge: the lowest or highest tried). {settings['max_train_steps']} steps of "
        f"{settings['per_device_train_batch_size']} x {settings['resolution']}, measured on the centres of the test "
        f"pictures ({settings['evaluated_size']} px). Run on {' and '.join(hardware)}.\n\n"
    )
    counts, rows = sorted(values_in(results, "train_pairs")), rows_of(results)
    for pairs in counts:
        text += f"## {pairs} pairs\n\n{quality_table(results, inputs, tasks, pairs)}\n\n"
        text += "Differences, paired by seed, with their standard error:\n\n"
        text += f"{differences_table(results, tasks, pairs)}\n\n{ssim_table(tested, tasks, pairs)}\n\n"
        if plot_radar(results, rows, tasks, pairs, folder / f"radar-{pairs}.png"):
            text += f"![each task from the worst to the best](radar-{pairs}.png)\n\n"
    if len(counts) > 1:
        plot_over_pairs(results, rows, tasks, counts, folder / "pairs.png")
        text += "![PSNR over the number of pairs](pairs.png)\n\n"
    text += f"## What it takes, and what is forgotten\n\n{cost_table(cells)}\n\n{OLD_TASK}\n\n"
    failed = [cell for cell in cells if "failed" in cell]
    names = [f"{SETTINGS.key(cell)}, {cell['learning_rate']:g}, seed {cell['seed']}" for cell in failed]
    text += f"Cells that failed: {'; '.join(names) or 'none'}.\n"
    text += (
        f"\nThe pictures that each network restored best, middling and worst lie in `{PICTURES_FOLDER}/` of the run "
        "(not all licences let them be shown here).\n"
    )
    write_text(folder / "README.md", text)
    return text
