"""Tables of benchmark.py, from its cells."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from statistics import mean, median, stdev

from benchmark_plots import plot_over_pairs, plot_radar
from benchmark_variants import NONE, PEFT_LORA
from grid_cells import Cell
from grid_report import Key, Results, Settings, difference, over_tasks, results_of, spread
from tuned_grid import CELLS_FILE, SETTINGS_FILE

from colora_peft.utils import write_text

SETTINGS = Settings(
    ("task", "train_pairs", "network", "method", "parameter_budget"),
    tuned_alike=("task", "network", "method", "parameter_budget"),
)

IMAGES_FOLDER = "pictures"
WORDS = f"""*full*: everything is trained; *decoder*, *bias*: these alone; *colora*: ranks by contribution; *lora*: one
rank for every layer, the highest that the budget pays for; *{PEFT_LORA}*: the same with PEFT's own LoRA, in the layers
that it takes. The number behind is the budget, of which one rank for all may leave some (see the parameters below)."""
OLD_TASK = """PSNR on the task's clean test images, degraded by PROD whatever the pre-training was; with adapters
switched off, which leaves the network as it was before the tuning."""


def values_in(results: Results, name: str) -> list[object]:
    """The different values of a setting, in order of first appearance; new weights (NONE) last."""
    index = SETTINGS.names.index(name)
    found = [value for value in dict.fromkeys(key[index] for key in results) if value is not None]
    return sorted(found, key=lambda value: value == NONE)


def label(network: str, method: str, budget: float | None) -> str:
    """As the paper writes it."""
    return f"{network} + {method}{f' {budget:.3g}' if budget is not None else ''}"


def label_of(cell: Cell) -> str:
    return label(cell["network"], cell["method"], cell.get("parameter_budget"))


def rows_of(results: Results) -> dict[str, Callable[[str, int], Key]]:
    """What is compared, by its label: the key of a task and a number of pairs."""
    rows = {}
    for _, _, network, method, budget in sorted(results, key=lambda key: key[2] == NONE):
        rows[label(network, method, budget)] = lambda task, pairs, rest=(network, method, budget): (task, pairs, *rest)
    return rows


def seeds_of(results: Results, pairs: int) -> dict[str, set[int]]:
    """By task, the seeds that any way has: a mean over fewer of them is a mean over other draws."""
    seeds: dict[str, set[int]] = {}
    for key, result in results.items():
        if key[1] == pairs:
            seeds.setdefault(key[0], set()).update(result.psnr)
    return seeds


def quality_table(results: Results, inputs: dict[str, float], tasks: list[str], pairs: int) -> str:
    """Markdown: test PSNR of each row and task, and the mean over the tasks where it has all tasks and seeds."""
    lines = [f"| {pairs} pairs | {' | '.join(tasks)} | mean |", "|---" * (len(tasks) + 2) + "|"]
    lines.append(f"| input | {' | '.join(f'{inputs[t]:.2f}' for t in tasks)} | {mean(inputs[t] for t in tasks):.2f} |")
    seeds = seeds_of(results, pairs)
    for name, key_of in rows_of(results).items():
        found = [results.get(key_of(task, pairs)) for task in tasks]
        if any(found):
            whole = all(r and set(r.psnr) == seeds[task] for r, task in zip(found, tasks, strict=True))
            average = f"{mean(mean(result.psnr.values()) for result in found):.2f}" if whole else ""
            lines.append(f"| {name} | {' | '.join(spread(r) if r else '' for r in found)} | {average} |")
    return "\n".join(lines)


def table_by_task(cells: list[Cell], tasks: list[str], value: str, digits: int, heading: str) -> str:
    """Markdown: a value of the cells for each row and task, mean ± standard deviation over the seeds."""
    found: dict[str, dict[str, list[float]]] = {}
    for cell in sorted(cells, key=lambda cell: cell["network"] == NONE):
        if value in cell:
            found.setdefault(label_of(cell), {}).setdefault(cell["task"], []).append(cell[value])
    lines = [f"| {heading} | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    for name, own in found.items():
        shown = [_with_spread(own[task], digits) if task in own else "" for task in tasks]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _with_spread(values: list[float], digits: int) -> str:
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 and stdev(values) > 0 else ""
    return f"{mean(values):.{digits}f}{spread}"


def claims_of(results: Results) -> dict[str, tuple[tuple, tuple]]:
    """The paper's claims: what is held against what, as (network, method, budget)."""
    networks, keys = values_in(results, "network"), {key[2:] for key in results}
    claims = {
        f"{one} less {two}, both tuned in full": ((one, "full", None), (two, "full", None))
        for one, two in combinations(networks, 2)
    }
    # The one that is tuned in all ways.
    first = max(networks, key=lambda network: len({key for key in keys if key[0] == network}))
    for budget in sorted(values_in(results, "parameter_budget"), reverse=True):
        colora = (first, "colora", budget)
        claims[f"CoLoRA less one rank for all, both under {budget:g}"] = colora, (first, "lora", budget)
        claims[f"CoLoRA less PEFT's LoRA, both under {budget:g}"] = colora, (first, PEFT_LORA, budget)
        claims[f"CoLoRA {budget:g} less full tuning"] = colora, (first, "full", None)
    return claims


def differences_table(results: Results, tasks: list[str], pairs: int) -> str:
    """Markdown: the claims as differences that are paired by seed; empty if there is none."""
    lines = [f"| dB, {pairs} pairs | {' | '.join(tasks)} | mean |", "|---" * (len(tasks) + 2) + "|"]
    for name, (one, other) in claims_of(results).items():
        found = [difference(results, (task, pairs, *one), (task, pairs, *other)) for task in tasks]
        if any(found):
            lines.append(f"| {name} | {' | '.join(str(d or '') for d in found)} | {over_tasks(found)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def cost_table(cells: list[Cell]) -> str:
    """Markdown: what each way of tuning trains and takes; means over its cells, of seconds the median."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(label_of(cell), []).append(cell)
    columns = {
        "trained parameters": lambda own: f"{mean(cell['trainable_parameters'] for cell in own):,.0f}",
        "of the adaptable weights": lambda own: f"{mean(cell['trainable_ratio'] for cell in own):.2%}",
        "seconds of training": lambda own: f"{median(cell['seconds'] for cell in own):.0f}",
        "and of contributions": lambda own: f"{median(cell.get('seconds_contributions', 0.0) for cell in own):.1f}",
    }
    if any("training_memory_bytes" in cell for cell in cells):
        columns["peak memory (GB)"] = peak_memory
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, own in groups.items():
        lines.append(f"| {name} | {' | '.join(column(own) for column in columns.values())} |")
    return "\n".join(lines)


def peak_memory(cells: list[Cell]) -> str:
    """Of the training alone, on a GPU."""
    found = [cell["training_memory_bytes"] for cell in cells if "training_memory_bytes" in cell]
    return f"{max(found) / 1e9:.2f}" if found else ""


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


def failures(cells: list[Cell]) -> str:
    """Markdown: what failed, and why."""
    lines = [
        f"- {cell['task']}, {cell['train_pairs']} pairs, {label_of(cell)}, {cell['learning_rate']:g}, seed "
        f"{cell['seed']}: {cell[fault]}"
        for cell in cells
        for fault in ("failed", "also_failed")
        if fault in cell
    ]
    return "\n".join(lines) or "None."


def images(folder: Path) -> str:
    """Markdown: the images that lie in the folder."""
    found = sorted((folder / IMAGES_FOLDER).glob("*.jpg"))
    return "\n\n".join(f"{path.stem}:\n\n![{path.stem}]({IMAGES_FOLDER}/{path.name})" for path in found) or "None."


def write_report(folder: Path) -> str:
    """Write README.md into `folder`; the text.

    Raises:
        FileNotFoundError: if no cell was run into it.
        ValueError: if one name stands for two networks or tasks in it.
    """
    if not (folder / CELLS_FILE).is_file():
        raise FileNotFoundError(f"There are no cells in {folder} to report; run some first.")
    cells, settings = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (CELLS_FILE, SETTINGS_FILE))
    check_names(cells)
    results = results_of(cells, SETTINGS, settings["tuning_seed"])
    tested = [cell for cell in cells if cell["seed"] != settings["tuning_seed"] and "psnr" in cell]
    hardware = sorted({cell["hardware"] for cell in cells if "hardware" in cell})
    text = (
        "Made by `python examples/benchmark.py`. "
        "Test PSNR in dB, in RGB on [0, 1] after rounding to 8 bits, per image, then averaged; mean ± standard "
        "deviation over the seeds (their number), at the learning rate that was best on held-out training pairs with "
        f"another seed, of {settings['tuned_at']} pairs (edge: the lowest or highest tried). "
        f"{settings['max_train_steps']} steps of "
        f"{settings['per_device_train_batch_size']} x {settings['resolution']}, measured on the centres of the test "
        f"images ({settings['evaluated_size']} px). Run on {' and '.join(hardware)}.\n\n{WORDS}\n\n"
    )
    text += "".join(of_pairs(results, tested, pairs, folder) for pairs in sorted(values_in(results, "train_pairs")))
    text += over_pairs(results, folder)
    text += f"## What it takes\n\n{cost_table(tested)}\n\nSeconds are of a machine that did other work as well.\n\n"
    tasks = values_in(results, "task")
    table = table_by_task(tested, tasks, "psnr_old_task", 2, "dB")
    text += f"## What is forgotten\n\n{OLD_TASK}\n\n{table}\n\n"
    text += "## Images\n\nInput, restored and target of the test images that a network restored best, middling and "
    text += f"worst, of the first seed; only those whose licence allows it are kept here.\n\n{images(folder)}\n\n"
    text += f"## Cells that failed\n\n{failures(cells)}\n"
    write_text(folder / "README.md", text)
    return text


def of_pairs(results: Results, tested: list[Cell], pairs: int, folder: Path) -> str:
    """Markdown: all of one number of pairs."""
    own = [cell for cell in tested if cell["train_pairs"] == pairs]
    tasks = [task for task in values_in(results, "task") if any(cell["task"] == task for cell in own)]
    inputs, ssim = ({cell["task"]: cell[name] for cell in own} for name in ("psnr_input", "ssim_input"))
    text = f"## {pairs} pairs\n\n{quality_table(results, inputs, tasks, pairs)}\n\n"
    differences = differences_table(results, tasks, pairs)
    if differences:
        text += (
            "Differences, paired by seed, with their standard error (tasks taken as independent of each other):\n\n"
        )
        text += f"{differences}\n\n"
    shown = ", ".join(f"{task} {ssim[task]:.3f}" for task in tasks)
    text += f"SSIM (input: {shown}):\n\n{table_by_task(own, tasks, 'ssim', 3, f'{pairs} pairs')}\n\n"
    if plot_radar(results, rows_of(results), tasks, pairs, folder / f"radar-{pairs}.png"):
        text += f"Each spoke has its own scale:\n\n![each task from the worst to the best](radar-{pairs}.png)\n\n"
    return text


def over_pairs(results: Results, folder: Path) -> str:
    """Markdown: the curves over the numbers of pairs, if there are any."""
    counts = sorted(values_in(results, "train_pairs"))
    if len(counts) > 1 and plot_over_pairs(results, rows_of(results), counts, folder / "pairs.png"):
        return "## Over the number of pairs\n\n![PSNR over the number of pairs](pairs.png)\n\n"
    return ""
