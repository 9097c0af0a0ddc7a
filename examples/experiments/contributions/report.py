"""Tables and plots of study_contributions.py, from its cells and scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
from grid_report import Key, Results, Settings, difference, over_tasks, results_of, spread
from matplotlib.figure import Figure
from tuned_grid import CELLS_FILE, SETTINGS_FILE

from colora_peft import ContributionScores
from colora_peft.utils import write_text

SCORES_FOLDER = "scores"
SETTINGS = Settings(
    ("task", "method", "parameter_budget", "estimator", "beta", "scores_of", "min_rank"),
    tuned_alike=("task", "method", "min_rank"),
)
BUDGET = 0.07


def others_of(task: str, tasks: list[str]) -> str:
    """Names the mean of the scores of all other tasks: what a prior that knows nothing of `task` can say."""
    return "+".join(sorted(other for other in tasks if other != task))


class Keys(NamedTuple):
    """The variants of a study, by what its settings say are the defaults."""

    default: str
    """Estimator."""
    beta: float

    def same_share(self, task: str, budget: float = BUDGET) -> Key:
        return (task, "same_share", budget, None, None, None, None)

    def same_rank(self, task: str, budget: float = BUDGET) -> Key:
        return (task, "lora", budget, None, None, None, None)

    def full(self, task: str, budget: float | None = None) -> Key:
        """Of any budget: it has none."""
        return (task, "full", None, None, None, None, None)

    def colora(
        self,
        task: str,
        budget: float = BUDGET,
        estimator: str | None = None,
        beta: float | None = None,
        scores_of: str | None = None,
        min_rank: int | None = None,
    ) -> Key:
        estimator = estimator or self.default
        own = self.beta / 2 if estimator == "fisher" else self.beta
        return (task, "colora", budget, estimator, own if beta is None else beta, scores_of or task, min_rank)


# ----------------------------------------------------------------------------------------------------------- tables


def table(results: Results, tasks: list[str], rows: dict[str, Callable[[str], Key]], keys: Keys) -> str:
    """Markdown: a row for each label, a column for each task, and the difference to the same share at 7%."""
    lines = [f"| | {' | '.join(tasks)} | less the same share, 7% |", "|---" * (len(tasks) + 2) + "|"]
    for label, key_of in rows.items():
        cells = [spread(results[key_of(task)]) if key_of(task) in results else "" for task in tasks]
        if any(cells):
            pairs = [(key_of(task), keys.same_share(task)) for task in tasks]
            less_uniform = over_tasks([difference(results, one, other) for one, other in pairs if one != other])
            lines.append(f"| {label} | {' | '.join(cells)} | {less_uniform} |")
    return "\n".join(lines)


def claims_table(results: Results, tasks: list[str], keys: Keys) -> str:
    """Markdown: what the method claims, as differences that are paired by seed."""
    pairs = {
        f"CoLoRA less the same share everywhere, both {budget:g}": (
            lambda task, budget=budget: keys.colora(task, budget),
            lambda task, budget=budget: keys.same_share(task, budget),
        )
        for budget in sorted(values_in(results, "parameter_budget"))
    }
    for budget in sorted(values_in(results, "parameter_budget")):
        pairs[f"CoLoRA less the same rank everywhere, both {budget:g}"] = (
            lambda task, budget=budget: keys.colora(task, budget),
            lambda task, budget=budget: keys.same_rank(task, budget),
        )
        pairs[f"CoLoRA with rank 1 at least less the same rank everywhere, both {budget:g}"] = (
            lambda task, budget=budget: keys.colora(task, budget, min_rank=1),
            lambda task, budget=budget: keys.same_rank(task, budget),
        )
        pairs[f"CoLoRA with rank 1 at least less CoLoRA, both {budget:g}"] = (
            lambda task, budget=budget: keys.colora(task, budget, min_rank=1),
            lambda task, budget=budget: keys.colora(task, budget),
        )
    pairs["CoLoRA with rank 1 at least, 0.02, less the same rank everywhere 0.07"] = (
        lambda task: keys.colora(task, 0.02, min_rank=1),
        keys.same_rank,
    )
    pairs["CoLoRA with rank 1 at least, 0.07, less full tuning"] = (
        lambda task: keys.colora(task, min_rank=1),
        keys.full,
    )
    pairs["CoLoRA 0.02 less the same rank everywhere 0.07"] = (lambda task: keys.colora(task, 0.02), keys.same_rank)
    pairs["CoLoRA 0.02 less the same share everywhere 0.07"] = (lambda task: keys.colora(task, 0.02), keys.same_share)
    pairs["CoLoRA 0.07 less full tuning"] = (keys.colora, keys.full)
    for name in values_in(results, "estimator"):
        if name != keys.default:
            pairs[f"{keys.default} less {name}, 0.07"] = (
                keys.colora,
                lambda task, name=name: keys.colora(task, estimator=name),
            )
    lines = [f"| dB | {' | '.join(tasks)} | mean |", "|---" * (len(tasks) + 2) + "|"]
    for label, (one, other) in pairs.items():
        found = [difference(results, one(task), other(task)) for task in tasks]
        if any(found):
            lines.append(f"| {label} | {' | '.join(str(d or '') for d in found)} | {over_tasks(found)} |")
    return "\n".join(lines)


def values_in(results: Results, name: str) -> list[object]:
    """The different values of a setting, in order of first appearance."""
    index = SETTINGS.names.index(name)
    return [value for value in dict.fromkeys(key[index] for key in results) if value is not None]


def estimator_rows(results: Results, keys: Keys) -> dict[str, Callable[[str], Key]]:
    rows = {"full tuning": keys.full, "the same share everywhere": keys.same_share}
    for name in values_in(results, "estimator"):
        rows[f"CoLoRA, {name}"] = lambda task, name=name: keys.colora(task, estimator=name)
    return rows


def budget_rows(results: Results, keys: Keys) -> dict[str, Callable[[str], Key]]:
    rows = {}
    for budget in sorted(values_in(results, "parameter_budget")):
        rows[f"the same share everywhere, {budget:g}"] = lambda task, budget=budget: keys.same_share(task, budget)
        rows[f"the same rank everywhere, {budget:g}"] = lambda task, budget=budget: keys.same_rank(task, budget)
        rows[f"CoLoRA, {budget:g}"] = lambda task, budget=budget: keys.colora(task, budget)
        rows[f"CoLoRA, rank 1 at least, {budget:g}"] = lambda task, budget=budget: keys.colora(
            task, budget, min_rank=1
        )
    return rows


def seconds_table(scores: dict[str, list[ContributionScores]], results: Results, keys: Keys) -> str:
    """Markdown: what each estimator takes, in seconds and as a share of the fine-tuning that it precedes."""
    tunings = [result.seconds for key, result in results.items() if key == keys.colora(key[0])]
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


def draw_curves(
    results: Results,
    tasks: list[str],
    curves: dict[str, Callable[[str, float], Key]],
    xs: list[float],
    xlabel: str,
) -> Figure:
    """Mean test PSNR of each curve over `xs`, a panel for each task; bars span the standard deviation of the seeds."""
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
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(curves))
    return figure


def plot_budgets(results: Results, tasks: list[str], keys: Keys, path: Path) -> None:
    curves = {
        "CoLoRA": keys.colora,
        "CoLoRA, rank 1 at least": lambda task, budget: keys.colora(task, budget, min_rank=1),
        "the same share": keys.same_share,
        "the same rank": keys.same_rank,
        "full tuning": keys.full,
    }
    budgets = sorted(values_in(results, "parameter_budget"))
    figure = draw_curves(results, tasks, curves, budgets, "trained share of the weights")
    for axes in figure.axes:
        axes.set_xscale("log")
        axes.set_xticks(budgets, [f"{budget:.3g}" for budget in budgets])
        axes.minorticks_off()
    figure.savefig(path, dpi=120)


def plot_betas(results: Results, tasks: list[str], keys: Keys, path: Path) -> None:
    def key_of(task: str, beta: float) -> Key:
        return keys.colora(task, beta=beta) if beta else keys.same_share(task)

    betas = sorted({0.0, *(key[4] for key in results if key[3] == keys.default)})
    figure = draw_curves(results, tasks, {"CoLoRA, 7%": key_of}, betas, "beta (0: the same share)")
    figure.savefig(path, dpi=120)


def sections(
    results: Results, scores: dict[tuple[str, str, int], ContributionScores], tasks: list[str], keys: Keys
) -> dict[str, str]:
    """Markdown of each part of the report, by its title."""
    by_estimator: dict[str, list[ContributionScores]] = {}
    for (_, estimator, _), own in scores.items():
        by_estimator.setdefault(estimator, []).append(own)
    betas = {"0 (the same share)": keys.same_share} | {
        f"{beta:g}": lambda task, beta=beta: keys.colora(task, beta=beta)
        for beta in sorted({key[4] for key in results if key[3] == keys.default})
    }
    others = {f"scores of {other}": lambda task, other=other: keys.colora(task, scores_of=other) for other in tasks}
    others["mean of the others' scores"] = lambda task: keys.colora(task, scores_of=others_of(task, tasks))
    compared = [(task, keys.default) for task in tasks]
    compared += [(tasks[0], name) for name in by_estimator if name != keys.default]
    return {
        "Differences, paired by seed": claims_table(results, tasks, keys),
        f"Estimators, 7%, beta {keys.beta:g} (fisher: half of it)": table(
            results, tasks, estimator_rows(results, keys), keys
        ),
        "What the scores take": seconds_table(by_estimator, results, keys),
        "Budgets": f"{table(results, tasks, budget_rows(results, keys), keys)}\n\n![](budgets.png)",
        "Beta, 7%": f"{table(results, tasks, betas, keys)}\n\n![](betas.png)",
        "Scores of another task, 7%": table(results, tasks, others, keys),
        "Rank correlation of the scores": correlation_table(scores, compared),
    }


def write_report(folder: Path) -> str:
    """Write report.md, budgets.png and betas.png into `folder`; the text."""
    cells, settings = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (CELLS_FILE, SETTINGS_FILE))
    results, scores = results_of(cells, SETTINGS, settings["tuning_seed"]), load_scores(folder / SCORES_FOLDER)
    keys, tasks = Keys(settings["default_estimator"], settings["beta"]), values_in(results, "task")
    plot_budgets(results, tasks, keys, folder / "budgets.png")
    plot_betas(results, tasks, keys, folder / "betas.png")
    text = (
        "Made by `python examples/study_contributions.py`. "
        "Test PSNR in dB, mean ± standard deviation over the seeds (their number), at the learning rate that was best "
        f"for the method on held-out training pairs with another seed. {settings['train_pairs']} pairs, "
        f"{settings['max_train_steps']} steps of {settings['per_device_train_batch_size']} x "
        f"{settings['resolution']}, measured on the centres of the test images ({settings['evaluated_size']} px). "
        "Differences are paired by seed, with their standard error over the seeds. faig walks to a network that was "
        f"tuned in full at {settings['faig']['learning_rate']:g}.\n\n"
    )
    parts = sections(results, scores, tasks, keys)
    text += "\n\n".join(f"## {title}\n\n{body}" for title, body in parts.items())
    write_text(folder / "report.md", text + "\n")
    return text
