"""The report of the comparison: tables and plots of its cells."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median, stdev

from colora_peft.utils import write_text
from examples.experiments.grid.cells import Cell
from examples.experiments.grid.curves import plot_curves
from examples.experiments.grid.results import Key, Results, differences_table, results_of, spread
from examples.experiments.grid.tuned import CELLS_FILE, REPORT_FILE, SETTINGS_FILE
from examples.experiments.methods.claims import claims_of
from examples.experiments.methods.default_table import default_table
from examples.experiments.methods.plan import (
    COLORA_DEFAULT,
    COLORA_PLAIN,
    FULL_CHECKERBOARD,
    NONE,
    PEFT_LORA,
    PEFT_LORA_CHECKERBOARD,
    label,
    label_of,
)
from examples.experiments.methods.plots import plot_radar
from examples.experiments.methods.rates import ONE_RATE, RATES, one_rate_table, rates_table
from examples.experiments.methods.results import SETTINGS, of_ssim, values_in
from examples.experiments.tables import markdown_table

IMAGES_FOLDER = "pictures"
WORDS = f"""*full* trains all weights, *decoder* and *bias* these alone. *colora* has ranks by contribution, *lora* one
rank for all layers: the highest that the budget pays for. *{PEFT_LORA}* is the same with PEFT's own LoRA, in the
layers that it takes. *{COLORA_DEFAULT}* is *colora* with the learning rate and the loss that finetune.py has without a
flag: no task chose them here. *{COLORA_PLAIN}* has that rate alone. *{FULL_CHECKERBOARD}* and
*{PEFT_LORA_CHECKERBOARD}* have that loss, at the rate chosen without it. All others train on the mean absolute error.
The number is the budget; one rank for all layers may leave some of it unused."""
MEAN_MATCHED = """PSNR after each channel of the restored image was shifted to the mean of the target: what is left
without constant errors of colour and brightness. Cells of earlier runs lack it."""
COST = """Seconds are of a machine that did other work as well, and compare on one machine alone."""
OLD_TASK = """PSNR on the task's clean test images, degraded by PROD whatever the pre-training was. Adapters are
switched off, which leaves the network as it was before the tuning."""


def rows_of(results: Results) -> dict[str, Callable[[str, int], Key]]:
    """All ways to tune by their label: each returns its key for a task and a number of pairs."""
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


# ----------------------------------------------------------------------------------------------------------- tables


def quality_table(results: Results, inputs: dict[str, float], tasks: list[str], pairs: int) -> str:
    """Markdown: test PSNR of each row and task, and the mean over the tasks where it has all tasks and seeds."""
    rows = [["input", *(f"{inputs[task]:.2f}" for task in tasks), f"{mean(inputs[task] for task in tasks):.2f}"]]
    seeds = seeds_of(results, pairs)
    for name, key_of in rows_of(results).items():
        found = [results.get(key_of(task, pairs)) for task in tasks]
        if any(found):
            whole = all(r and set(r.psnr) == seeds[task] for r, task in zip(found, tasks, strict=True))
            average = f"{mean(mean(result.psnr.values()) for result in found):.2f}" if whole else ""
            rows.append([name, *(spread(result) if result else "" for result in found), average])
    return markdown_table([f"{pairs} pairs", *tasks, "mean"], rows)


def table_by_task(cells: list[Cell], tasks: list[str], value: str, digits: int, heading: str) -> str:
    """Markdown: a value of the cells for each row and task, mean ± standard deviation over the seeds."""
    found: dict[str, dict[str, list[float]]] = {}
    for cell in sorted(cells, key=lambda cell: cell["network"] == NONE):
        if value in cell:
            found.setdefault(label_of(cell), {}).setdefault(cell["task"], []).append(cell[value])
    rows = [
        [name, *(_with_spread(own[task], digits) if task in own else "" for task in tasks)]
        for name, own in found.items()
    ]
    return markdown_table([heading, *tasks], rows)


def _with_spread(values: list[float], digits: int) -> str:
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 and stdev(values) > 0 else ""
    return f"{mean(values):.{digits}f}{spread}"


def cost_table(cells: list[Cell]) -> str:
    """Markdown: trained parameters, time and memory of each way to tune; means over its cells, medians of seconds."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(label_of(cell), []).append(cell)
    columns = {
        "trained parameters": lambda own: f"{mean(cell['trainable_parameters'] for cell in own):,.0f}",
        "share of the adaptable weights": lambda own: f"{mean(cell['trainable_ratio'] for cell in own):.2%}",
        "training (s)": lambda own: median_seconds(own, "seconds", 0),
        "contributions (s)": lambda own: median_seconds(own, "seconds_contributions", 1),
    }
    if len(hardware_of(cells)) > 1:
        columns["machine"] = lambda own: " and ".join(hardware_of(own))
    if any("training_memory_bytes" in cell for cell in cells):
        columns["peak memory (GB)"] = peak_memory
    rows = ([name, *(column(own) for column in columns.values())] for name, own in groups.items())
    return markdown_table(["", *columns], rows)


def median_seconds(cells: list[Cell], name: str, digits: int) -> str:
    """Median of the seconds under a name, if the cells are of one machine."""
    if len(hardware_of(cells)) > 1:
        return ""
    return f"{median(cell.get(name, 0.0) for cell in cells):.{digits}f}"


def peak_memory(cells: list[Cell]) -> str:
    """Peak memory of the training alone, on a GPU."""
    found = [cell["training_memory_bytes"] for cell in cells if "training_memory_bytes" in cell]
    return f"{max(found) / 1e9:.2f}" if found else ""


def failures(cells: list[Cell]) -> str:
    """Markdown: the cells that failed, with their errors."""
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


# ----------------------------------------------------------------------------------------------------------- report


def check_names(cells: list[Cell]) -> None:
    """Refuses cells in which one name means two networks, two tasks or two losses.

    Raises:
        ValueError: Names the network, the task or the method.
    """
    for name, what in (("network", "weights"), ("task", "data"), ("method", "checkerboard_weight")):
        found: dict[object, object] = {}
        for cell in cells:
            if found.setdefault(cell[name], cell.get(what)) != cell.get(what):
                raise ValueError(
                    f"The {name} {cell[name]!r} was run with other {what} before: choose another --output_dir, or "
                    f"delete the cells of one from {CELLS_FILE}."
                )


def write_report(folder: Path) -> str:
    """Writes the report and its plots into `folder`; returns the text.

    Raises:
        FileNotFoundError: The folder has no cells.
        ValueError: One name means two networks, tasks or losses in it.
    """
    if not (folder / CELLS_FILE).is_file():
        raise FileNotFoundError(f"There are no cells in {folder} to report; run some first.")
    cells, settings = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (CELLS_FILE, SETTINGS_FILE))
    check_names(cells)
    results = results_of(cells, SETTINGS, settings["tuning_seed"])
    rates = {key: result.learning_rate for key, result in results.items()}
    tested = [
        cell
        for cell in cells
        if "psnr" in cell
        and cell["seed"] != settings["tuning_seed"]
        and cell["learning_rate"] == rates.get(SETTINGS.key(cell))
    ]
    parts = {"": introduction(tested, settings)}
    counts = sorted(values_in(results, "train_pairs"))
    for pairs in counts:
        parts[f"{pairs} pairs"] = of_pairs(results, tested, pairs, folder)
    if len(counts) > 1:
        tasks, curves = values_in(results, "task"), rows_of(results)
        plot_curves(folder / "pairs.png", results, tasks, curves, counts, "training pairs", log_base=2)
        parts["Over the number of pairs"] = "![PSNR over the number of pairs](pairs.png)"
    tuning = [cell for cell in cells if cell["seed"] == settings["tuning_seed"]]
    parts["Learning rates"] = f"{RATES}\n\n{rates_table(tuning)}"
    one_rate = one_rate_table(tuning)
    if one_rate:
        parts["One learning rate for all tasks"] = f"{ONE_RATE}\n\n{one_rate}"
    parts["Cost"] = f"{cost_table(tested)}\n\n{COST}"
    table = table_by_task(tested, values_in(results, "task"), "psnr_old_task", 2, "dB")
    parts["Forgetting"] = f"{OLD_TASK}\n\n{table}"
    parts["Images"] = (
        "Input, restored image and target of the test images that a network restored best, middling and worst, of the "
        f"first seed; those alone are kept here whose licence allows it.\n\n{images(folder)}"
    )
    parts["Cells that failed"] = failures(cells)
    text = "\n\n".join(f"## {title}\n\n{body}" if title else body for title, body in parts.items()) + "\n"
    write_text(folder / REPORT_FILE, text)
    return text


def introduction(tested: list[Cell], settings: Cell) -> str:
    """Markdown: how the figures were made, and the words of the tables."""
    return (
        "Made by `python -m examples.experiments.methods.run`. Test PSNR in dB, in RGB on [0, 1] after rounding to 8 "
        "bits, per image, then averaged: mean ± standard deviation over the seeds (their number). The learning rate "
        f"is the best on held-out training pairs with another seed, of {settings['tuned_at']} pairs (edge: the lowest "
        f"or highest tried). {settings['max_train_steps']} steps of {settings['per_device_train_batch_size']} x "
        f"{settings['resolution']}, measured on the centres of the test images ({settings['evaluated_size']} px). Run "
        f"on {' and '.join(hardware_of(tested))}.\n\n{WORDS}"
    )


def hardware_of(cells: list[Cell]) -> list[str]:
    """The machines that cells were run on."""
    return sorted({cell["hardware"] for cell in cells if "hardware" in cell})


def of_pairs(results: Results, tested: list[Cell], pairs: int, folder: Path) -> str:
    """Markdown: all results of one number of pairs."""
    own = [cell for cell in tested if cell["train_pairs"] == pairs]
    tasks = [task for task in values_in(results, "task") if any(cell["task"] == task for cell in own)]
    inputs, ssim = ({cell["task"]: cell[name] for cell in own} for name in ("psnr_input", "ssim_input"))
    parts = [quality_table(results, inputs, tasks, pairs)]
    similarity = of_ssim(results, own)
    default = default_table(results, similarity, {task: (inputs[task], ssim[task]) for task in tasks}, tasks, pairs)
    if default:
        parts += [
            "CoLoRA with nothing tuned, the others at the rate that is best for each task on the mean absolute error, "
            "of those tried:",
            default,
        ]
    differences = differences_table(results, tasks, claims_of(results, pairs), f"dB, {pairs} pairs")
    if differences:
        parts += ["Differences, paired by seed, with their standard error (tasks taken as independent of each other):"]
        parts += [differences]
    matched = {cell["task"]: cell["psnr_input_mean_matched"] for cell in own if "psnr_input_mean_matched" in cell}
    if matched:
        shown = ", ".join(f"{task} {value:.2f}" for task, value in matched.items())
        table = table_by_task(own, list(matched), "psnr_mean_matched", 2, f"dB, {pairs} pairs")
        parts += [f"{MEAN_MATCHED} Input: {shown}.", table]
    shown = ", ".join(f"{task} {ssim[task]:.3f}" for task in tasks)
    parts += [f"SSIM (input: {shown}):", table_by_task(own, tasks, "ssim", 3, f"{pairs} pairs")]
    if differences:
        hundredths = differences_table(of_ssim(results, own, 100), tasks, claims_of(results, pairs), f"{pairs} pairs")
        parts += ["Differences of SSIM in hundredths:", hundredths]
    if plot_radar(results, rows_of(results), tasks, pairs, folder / f"radar-{pairs}.png"):
        parts += [f"Each spoke has its own scale:\n\n![each task from the worst to the best](radar-{pairs}.png)"]
    return "\n\n".join(parts)
