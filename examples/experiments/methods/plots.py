"""Plots of the comparison: the radar of the tasks, and images."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure
from torch import nn

from colora_peft.data import PairSource
from colora_peft.evaluation import psnr, restore_some, save_before_after
from examples.experiments.grid.results import Key, Results

Rows = dict[str, Callable[[str, int], Key]]
"""Compared ways by their label: each returns its key for a task and a number of pairs."""


def _style(name: str) -> dict[str, str]:
    """Adapters are solid and the others dashed, because there may be more rows than Matplotlib has colours."""
    return {"linestyle": "-" if "lora" in name else "--"}


def plot_radar(results: Results, rows: Rows, tasks: list[str], pairs: int, path: Path) -> bool:
    """Draws a spoke for each task, from the lowest PSNR to the highest; returns whether there is enough to draw.

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
            "center" if abs(math.cos(angle)) < 0.1 else "left" if math.cos(angle) > 0 else "right"
        )
    axes.set_yticks([0.2, 0.6, 1.0], [])
    axes.set_ylim(0, 1.05)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return True


def save_best_median_worst(model: nn.Module, pairs: PairSource, path: Path) -> None:
    """Saves input, restored image and target where the network restores best, middling and worst by PSNR."""
    rows = restore_some(model, pairs, count=len(pairs))
    order = sorted(range(len(rows)), key=lambda index: psnr(rows[index][1][None], rows[index][2][None]).item())
    chosen = dict.fromkeys([order[-1], order[len(order) // 2], order[0]])
    path.parent.mkdir(parents=True, exist_ok=True)
    save_before_after([rows[index] for index in chosen], path)
