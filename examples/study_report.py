"""Tables and plots of study_contributions.py, from its cells and scores."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
from grid_cells import Cell

from colora_peft import ContributionScores
from colora_peft.files import write_text

VARIANT = ("task", "method", "parameter_budget", "estimator", "beta", "scores_of")
"""Settings that make a variant; None where a method has no such."""
BUDGET = 0.07
BETA = 0.5


class Result(NamedTuple):
    """Of a variant on a task, at its learning rate."""

    learning_rate: float
    psnr: dict[int, float]
    """Test PSNR (dB) by seed."""
    seconds: float
    """Of training, mean over the seeds."""


Key = tuple[object, ...]
Results = dict[Key, Result]


def results_of(cells: Iterable[Cell]) -> Results:
    """Of each variant at the rate that was best on the held-out pairs of its first seed."""
    groups: dict[Key, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(tuple(cell.get(name) for name in VARIANT), []).append(cell)
    results = {}
    for key, own in groups.items():
        first = min(cell["seed"] for cell in own)
        done = [cell for cell in own if "test_psnr" in cell]
        tuned = [cell for cell in done if cell["seed"] == first]
        if tuned:
            rate = max(tuned, key=lambda cell: cell["psnr"])["learning_rate"]
            chosen = [cell for cell in done if cell["learning_rate"] == rate]
            psnr = {cell["seed"]: cell["test_psnr"] for cell in chosen}
            results[key] = Result(rate, psnr, mean(cell["seconds"] for cell in chosen))
    return results


def uniform(task: str, budget: float = BUDGET) -> Key:
    return (task, "lora", budget, None, None, None)


def colora(task: str, estimator: str, budget: float = BUDGET, beta: float = BETA, scores_of: str | None = None) -> Key:
    return (task, "colora", budget, estimator, beta, scores_of or task)


# ----------------------------------------------------------------------------------------------------------- tables


def spread(values: list[float]) -> str:
    """Mean and standard deviation over the seeds."""
    return f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def paired(results: Results, keys: list[Key], others: list[Key]) -> str:
    """Mean difference over tasks and seeds that both have, and its standard error, the pairs being independent."""
    differences = [
        results[key].psnr[seed] - results[other].psnr[seed]
        for key, other in zip(keys, others, strict=True)
        if key in results and other in results
        for seed in results[key].psnr.keys() & results[other].psnr.keys()
    ]
    if not differences:
        return ""
    error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return f"{mean(differences):+.2f} ± {error:.2f} ({len(differences)})"


def table(results: Results, tasks: list[str], rows: dict[str, Callable[[str], Key]]) -> str:
    """Markdown: a row for each label, a column for each task, and the paired difference to uniform ranks at 7%."""
    lines = [f"| | {' | '.join(tasks)} | less uniform 7% |", "|---" * (len(tasks) + 2) + "|"]
    for label, key_of in rows.items():
        keys = [key_of(task) for task in tasks]
        cells = [
            f"{spread(list(results[key].psnr.values()))} at {results[key].learning_rate:g}" if key in results else ""
            for key in keys
        ]
        if any(cells):
            difference = paired(results, keys, [uniform(task) for task in tasks])
            lines.append(f"| {label} | {' | '.join(cells)} | {difference} |")
    return "\n".join(lines)


def values_in(results: Results, name: str) -> list[object]:
    """The different values of a setting, in order of first appearance."""
    index = VARIANT.index(name)
    return [value for value in dict.fromkeys(key[index] for key in results) if value is not None]


def estimator_rows(results: Results) -> dict[str, Callable[[str], Key]]:
    rows = {"full tuning": lambda task: (task, "full", None, None, None, None), "uniform ranks": uniform}
    for name in values_in(results, "estimator"):
        rows[f"CoLoRA, {name}"] = lambda task, name=name: colora(task, name)
    return rows


def budget_rows(results: Results, default: str) -> dict[str, Callable[[str], Key]]:
    rows = {}
    for budget in sorted(values_in(results, "parameter_budget")):
        rows[f"uniform, {budget:g}"] = lambda task, budget=budget: uniform(task, budget)
        rows[f"CoLoRA, {budget:g}"] = lambda task, budget=budget: colora(task, default, budget)
    return rows


def seconds_table(scores: dict[str, list[ContributionScores]], results: Results, default: str) -> str:
    """Markdown: what each estimator takes, in seconds and as a share of the fine-tuning that it precedes."""
    tunings = [result.seconds for key, result in results.items() if key[3] == default and key[2] == BUDGET]
    lines = ["| estimator | seconds | of the fine-tuning | completeness error |", "|---|---|---|---|"]
    for name, own in scores.items():
        seconds = mean(score.seconds for score in own)
        share = f"{seconds / mean(tunings):.0%}" if tunings else ""
        errors = [score.completeness_error for score in own if score.completeness_error is not None]
        lines.append(f"| {name} | {seconds:.1f} | {share} | {f'{mean(errors):.1%}' if errors else ''} |")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------- scores


def load_scores(folder: Path) -> dict[tuple[str, str, int], ContributionScores]:
    """By task, estimator and seed."""
    found = {}
    for path in sorted(folder.glob("*-*-seed*.json")):
        task, estimator, seed = path.stem.rsplit("-", 2)
        found[task, estimator, int(seed.removeprefix("seed"))] = ContributionScores.load(path)
    return found


def rank_correlation(one: ContributionScores, other: ContributionScores) -> float:
    """Spearman's, over the layers."""
    return float(np.corrcoef(*(_ranks(np.array(list(scores.scores.values()))) for scores in (one, other)))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """1 is the smallest; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def correlation_table(scores: dict[tuple[str, str, int], ContributionScores], rows: list[tuple[str, str]]) -> str:
    """Markdown: mean over the seeds of the rank correlation between (task, estimator) and (task, estimator)."""
    names = [f"{task}, {estimator}" for task, estimator in rows]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(rows) + 1) + "|"]
    for row, name in zip(rows, names, strict=True):
        cells = []
        for column in rows:
            values = [
                rank_correlation(own, scores[(*column, seed)])
                for (task, estimator, seed), own in scores.items()
                if (task, estimator) == row and (*column, seed) in scores
            ]
            cells.append(f"{mean(values):.2f}" if values else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------ plots


def plot_curves(
    results: Results,
    tasks: list[str],
    curves: dict[str, Callable[[str, float], Key]],
    xs: list[float],
    xlabel: str,
    path: Path,
) -> None:
    """Mean test PSNR of each curve over `xs`, a panel for each task; bars span the standard deviation of the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(tasks), 3.2), layout="constrained")
    for axes, task in zip(np.atleast_1d(figure.subplots(1, len(tasks))), tasks, strict=True):
        for label, key_of in curves.items():
            points = [(x, list(results[key_of(task, x)].psnr.values())) for x in xs if key_of(task, x) in results]
            if points:
                means = [mean(values) for _, values in points]
                errors = [stdev(values) if len(values) > 1 else 0.0 for _, values in points]
                axes.errorbar([x for x, _ in points], means, errors, marker="o", capsize=3, label=label)
        axes.set(title=task, xlabel=xlabel, ylabel="test PSNR (dB)")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)


def plot_budgets(results: Results, tasks: list[str], default: str, path: Path) -> None:
    curves = {
        "CoLoRA": lambda task, budget: colora(task, default, budget),
        "uniform ranks": uniform,
        "full tuning": lambda task, budget: (task, "full", None, None, None, None),
    }
    budgets = sorted(values_in(results, "parameter_budget"))
    plot_curves(results, tasks, curves, budgets, "trained share of the weights", path)


def plot_betas(results: Results, tasks: list[str], default: str, path: Path) -> None:
    def key_of(task: str, beta: float) -> Key:
        return colora(task, default, beta=beta) if beta else uniform(task)

    betas = sorted({0.0, *values_in(results, "beta")})
    plot_curves(results, tasks, {"CoLoRA, 7%": key_of}, betas, "beta (0 is uniform)", path)


def write_report(folder: Path, default: str) -> str:
    """Write report.md, budgets.png and betas.png into `folder`; the text. `default` is the estimator of all questions
    but the first.
    """
    cells = json.loads((folder / "cells.json").read_text(encoding="utf-8"))
    results, scores = results_of(cells), load_scores(folder / "scores")
    tasks = values_in(results, "task")
    plot_budgets(results, tasks, default, folder / "budgets.png")
    plot_betas(results, tasks, default, folder / "betas.png")
    by_estimator: dict[str, list[ContributionScores]] = {}
    for (_, estimator, _), own in scores.items():
        by_estimator.setdefault(estimator, []).append(own)
    betas = sorted(values_in(results, "beta"))
    beta_rows = {"0 (uniform)": uniform} | {
        f"{beta:g}": lambda task, beta=beta: colora(task, default, beta=beta) for beta in betas
    }
    transfer_rows = {
        f"scores of {other}": lambda task, other=other: colora(task, default, scores_of=other) for other in tasks
    }
    sections = {
        "Estimators, 7%, beta 0.5": table(results, tasks, estimator_rows(results)),
        "What the scores take": seconds_table(by_estimator, results, default),
        "Budgets": f"{table(results, tasks, budget_rows(results, default))}\n\n![](budgets.png)",
        "Beta, 7%": f"{table(results, tasks, beta_rows)}\n\n![](betas.png)",
        "Scores of another task, 7%": table(results, tasks, transfer_rows),
        "Rank correlation of the scores": correlation_table(
            scores,
            [(task, default) for task in tasks] + [(tasks[0], name) for name in by_estimator if name != default],
        ),
    }
    sample = cells[0]
    text = (
        "Test PSNR in dB, mean ± standard deviation over the seeds, at the rate that was best on held-out training "
        f"pairs (first seed). {sample['train_pairs']} pairs, {sample['max_train_steps']} steps of "
        f"{sample['per_device_train_batch_size']} x {sample['resolution']}. The last column is the mean over "
        "tasks and seeds of the difference to uniform ranks, with its standard error (number of pairs).\n\n"
    ) + "\n\n".join(f"## {title}\n\n{body}" for title, body in sections.items())
    write_text(folder / "report.md", text + "\n")
    return text
