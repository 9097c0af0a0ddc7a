"""Plots of the comparison: PSNR over the number of pairs, the radar of the tasks, and images."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure
from torch import nn

from colora_peft.data import PairSource
from colora_peft.evaluation import psnr, restore_some, save_before_after
from examples.experiments.grid.results import Key, Results

Rows = dict[str, Callable[[str, int], Key]]
"""Compared ways by their label: each returns its key for a task and a number of pairs."""


def plot_over_pairs(results: Results, rows: Rows, counts: list[int], path: Path) -> bool:
    """Draw mean test PSNR over the number of pairs; returns whether there is a curve to draw.

    A curve needs at least two numbers of pairs. Tasks count that every curve has at each of its points.
    """
    points = {name: [count for count in counts if _tasks_at(results, key_of, count)] for name, key_of in rows.items()}
    curves = {name: own for name, own in points.items() if len(own) > 1}
    shared = [_tasks_at(results, rows[name], count) for name, own in curves.items() for count in own]
    tasks = sorted(set.intersection(*shared)) if shared else []
    if not tasks:
        return False
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, own in curves.items():
        found = [[list(results[rows[name](task, count)].psnr.values()) for task in tasks] for count in own]
        means = [mean(map(mean, values)) for values in found]
        errors = [math.hypot(*map(_standard_error, values)) / len(tasks) for values in found]
        axes.errorbar(own, means, errors, marker="o", capsize=3, label=name, **_style(name))
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set(xlabel="training pairs", ylabel="test PSNR (dB), mean over the tasks")
    axes.set_title(", ".join(tasks), fontsize="small")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    return True


def _tasks_at(results: Results, key_of: Callable[[str, int], Key], count: int) -> set[str]:
    return {key[0] for key in results if key == key_of(key[0], count)}


def _style(name: str) -> dict[str, str]:
    """Adapters are solid and the others dashed, because there may be more rows than Matplotlib has colours."""
    return {"linestyle": "-" if "lora" in name else "--"}


def _standard_error(values: list[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def plot_radar(results: Results, rows: Rows, tasks: list[str], pairs: int, path: Path) -> bool:
    """Draw a spoke for each task, from the lowest PSNR to the highest; returns whether there is enough to draw.

    It takes two rows that have all tasks, and three tasks.
    """
    complete = {
        name: [mean(results[key_of(task, pairs)].psnr.values()) for task in tasks]
        for name, key_of in rows.items()
        if all(key_of(task, pairs) in results for task in tasks)
    }
    if len(complete) < 2 or len(tasks) < 3:
        return False
    lowest, highest = ([pick(values) for values in zip(*complete.values(), strict=True)] for pick in (min, max))
    angles = [2 * math.pi * index / len(tasks) for index in range(len(tasks))]
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots(subplot_kw={"projection": "polar"})
    for name, values in complete.items():
        # From 0.2 on, so that the worst is a shape, too.
        scaled = [
            0.2 + 0.8 * (value - low) / ((high - low) or 1.0)
            for value, low, high in zip(values, lowest, highest, strict=True)
        ]
        axes.plot([*angles, angles[0]], [*scaled, scaled[0]], marker="o", markersize=3, label=name, **_style(name))
    labels = [f"{task}\n{low:.2f} to {high:.2f} dB" for task, low, high in zip(tasks, lowest, highest, strict=True)]
    axes.set_xticks(angles, labels)
    axes.tick_params(axis="x", pad=10)
    for angle, text in zip(angles, axes.get_xticklabels(), strict=True):
        text.set_horizontalalignment(
            "center" if abs(math.cos(angle)) < 0.5 else "left" if math.cos(angle) > 0 else "right"
        )
    axes.set_yticks([0.2, 0.6, 1.0], [])
    axes.set_ylim(0, 1.05)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return True


def save_best_median_worst(model: nn.Module, pairs: PairSource, path: Path) -> None:
    """Save input, restored image and target where the network restores best, middling and worst by PSNR."""
    rows = restore_some(model, pairs, count=len(pairs))
    order = sorted(range(len(rows)), key=lambda index: psnr(rows[index][1][None], rows[index][2][None]).item())
    chosen = dict.fromkeys([order[-1], order[len(order) // 2], order[0]])
    path.parent.mkdir(parents=True, exist_ok=True)
    save_before_after([rows[index] for index in chosen], path)
