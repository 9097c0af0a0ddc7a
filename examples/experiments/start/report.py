"""The report of the ways to begin: differences to PEFT's LoRA, and their means."""

from __future__ import annotations

from statistics import mean

from examples.experiments.grid.cells import Cell
from examples.experiments.grid.results import standard_error
from examples.experiments.methods.plan import PEFT_LORA
from examples.experiments.start.ways import TITLES, WAYS
from examples.experiments.tables import markdown_table

Row = tuple[str, float]
"""A way and its learning rate."""
Draw = tuple[str, int]
"""A task and the seed that drew its pairs."""


def rows_of(cells: list[Cell]) -> dict[Row, dict[Draw, float]]:
    """PSNR by task and seed of each way and learning rate, in the order of WAYS.

    Raises:
        ValueError: A task was run with two sets of pairs.
    """
    rows: dict[Row, dict[Draw, float]] = {}
    data: dict[str, object] = {}
    for cell in cells:
        if data.setdefault(cell["task"], cell.get("data")) != cell.get("data"):
            raise ValueError(f"The task {cell['task']!r} was run with other pairs: choose another --output_dir.")
        if "psnr" in cell:
            rows.setdefault((cell["way"], cell["learning_rate"]), {})[cell["task"], cell["seed"]] = cell["psnr"]
    order = list(WAYS)
    return dict(sorted(rows.items(), key=lambda item: (order.index(item[0][0]), item[0][1])))


def reference(rows: dict[Row, dict[Draw, float]]) -> Row | None:
    """PEFT's LoRA at the learning rate that is best on the mean over what all its rates have; None without it."""
    own = {row: values for row, values in rows.items() if row[0] == PEFT_LORA}
    common = set.intersection(*map(set, own.values())) if own else set()
    return max(own, key=lambda row: mean(own[row][key] for key in common)) if common else None


def differences_to(base: Row, rows: dict[Row, dict[Draw, float]]) -> dict[Row, dict[Draw, float]]:
    """PSNR of each row minus that of `base`, on the draws that both have; rows that share none are left out."""
    found = {
        row: {draw: values[draw] - rows[base][draw] for draw in values if draw in rows[base]}
        for row, values in rows.items()
    }
    return {row: values for row, values in found.items() if values}


def means_of_tasks(values: dict[Draw, float]) -> dict[str, float]:
    """Mean over the draws of each task."""
    tasks = dict.fromkeys(task for task, _ in values)
    return {task: mean(value for (own, _), value in values.items() if own == task) for task in tasks}


def mean_with_error(values: dict[Draw, float]) -> str:
    """Mean over the tasks, with its standard error over them; over the draws, if there is a single task."""
    means = list(means_of_tasks(values).values())
    if len(means) == 1:
        means = list(values.values())
    return f"{mean(means):+.2f}" + (f" ± {standard_error(means):.2f}" if len(means) > 1 else "")


def table_by_task(found: dict[Row, dict[Draw, float]]) -> str:
    """Markdown: the differences of each row by task, and their mean."""
    tasks = list(dict.fromkeys(task for values in found.values() for task, _ in values))
    lines = []
    for (way, rate), values in found.items():
        means = means_of_tasks(values)
        shown = (f"{means[task]:+.2f}" if task in means else "" for task in tasks)
        lines.append([TITLES[way], f"{rate:g}", *shown, mean_with_error(values), len(values)])
    return markdown_table(["way", "learning rate", *tasks, "mean", "draws"], lines)


def table_by_rate(found: dict[Row, dict[Draw, float]], base: Row) -> str:
    """Markdown: the mean differences by way and learning rate, without rows that lack some of the draws."""
    shown = {row: mean_with_error(values) for row, values in found.items() if len(values) == len(found[base])}
    shown[base] = "0"
    rates = sorted({rate for _, rate in shown})
    ways = dict.fromkeys(way for way, _ in shown)
    lines = ([TITLES[way], *(shown.get((way, rate), "") for rate in rates)] for way in ways)
    return markdown_table(["", *(f"{rate:g}" for rate in rates)], lines)


def report(cells: list[Cell]) -> str:
    """Markdown: both tables, and the cells that failed."""
    rows = rows_of(cells)
    base = reference(rows)
    if base is None:
        return f"No cells of {TITLES[PEFT_LORA]}, to which the others are compared.\n"
    found, first = differences_to(base, rows), cells[0]
    failed = [cell for cell in cells if "failed" in cell]
    setting = (
        f"{first['max_train_steps']} steps of {first['per_device_train_batch_size']} x {first['resolution']}, "
        f"budget {first['parameter_budget']:.0%}, {first['validation_pairs']} pairs held out of the training folder."
    )
    return (
        f"PSNR in dB minus that of {TITLES[PEFT_LORA]} at {base[1]:g}, paired by task and draw; the mean over the "
        "tasks with its standard error over them, or over the draws of a single task. "
        f"{setting}\n\n{table_by_task(found)}\n\nThe means by learning rate:\n\n{table_by_rate(found, base)}\n"
        + "".join(f"\nFailed: {c['task']}, {c['way']}, {c['learning_rate']:g}, seed {c['seed']}.\n" for c in failed)
    )
