"""Plots of a tuned grid's results over one of its settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from matplotlib.figure import Figure

from examples.experiments.grid.results import Key, Results


def plot_curves(
    path: Path,
    results: Results,
    tasks: Sequence[str],
    curves: dict[str, Callable[[str, float], Key]],
    xs: Sequence[float],
    xlabel: str,
    log_base: float | None = None,
) -> None:
    """Draws mean test PSNR of each curve over `xs`, a panel for each task; bars span the deviation of the seeds."""
    figure = Figure(figsize=(3.6 * len(tasks), 3.2), layout="constrained")
    for axes, task in zip(np.atleast_1d(figure.subplots(1, len(tasks))), tasks, strict=True):
        for number, (label, key_of) in enumerate(curves.items()):
            points = [(x, list(results[key_of(task, x)].psnr.values())) for x in xs if key_of(task, x) in results]
            if points:
                means = [mean(values) for _, values in points]
                errors = [stdev(values) if len(values) > 1 else 0.0 for _, values in points]
                axes.errorbar(
                    [x for x, _ in points], means, errors, marker="o", capsize=3, label=label, color=f"C{number}"
                )
        axes.set(title=task, xlabel=xlabel, ylabel="test PSNR (dB)")
        axes.grid(alpha=0.3)
        if log_base is not None:
            axes.set_xscale("log", base=log_base)
            axes.set_xticks(xs, [f"{x:.3g}" for x in xs])
            axes.minorticks_off()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=min(len(curves), 5))
    figure.savefig(path, dpi=120)
