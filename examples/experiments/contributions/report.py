"""The report of the study of contributions: tables and plots of its cells and scores."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np

from colora_peft import ContributionScores
from colora_peft.utils import write_text
from examples.experiments.grid import results as grid_results
from examples.experiments.grid.curves import plot_curves
from examples.experiments.grid.results import (
    Key,
    KeyOf,
    Results,
    Settings,
    difference,
    differences_table,
    over_tasks,
    results_of,
    spread,
)
from examples.experiments.grid.tuned import CELLS_FILE, REPORT_FILE, SETTINGS_FILE
from examples.experiments.tables import markdown_table

SCORES_FOLDER = "scores"
SETTINGS = Settings(
    ("task", "method", "parameter_budget", "estimator", "beta", "scores_of", "min_rank"),
    tuned_alike=("task", "method", "min_rank"),
)
BUDGET = 0.07
values_in = partial(grid_results.values_in, settings=SETTINGS)


def others_of(task: str, tasks: list[str]) -> str:
    """Name of the mean of the scores of all other tasks: a prior that knows nothing of `task`."""
    return "+".join(sorted(other for other in tasks if other != task))


class Keys(NamedTuple):
    """Keys of the variants of a study, whose settings name the defaults."""

    default: str
    """Estimator."""
    beta: float

    def same_share(self, task: str, budget: float = BUDGET) -> Key:
        """The same share of every layer."""
        return (task, "same_share", budget, None, None, None, None)

    def same_rank(self, task: str, budget: float = BUDGET) -> Key:
        """The same rank in every layer."""
        return (task, "lora", budget, None, None, None, None)

    def full(self, task: str, budget: float | None = None) -> Key:
        """Full tuning, which has no budget."""
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
        """Ranks by contribution."""
        estimator = estimator or self.default
        own = self.beta / 2 if estimator == "fisher" else self.beta
        return (task, "colora", budget, estimator, own if beta is None else beta, scores_of or task, min_rank)


# ----------------------------------------------------------------------------------------------------------- tables


def table(results: Results, tasks: list[str], rows: dict[str, KeyOf], keys: Keys) -> str:
    """Markdown: a row for each label, a column for each task, and the difference to the same share at 7%."""
    lines = []
    for label, key_of in rows.items():
        cells = [spread(results[key_of(task)]) if key_of(task) in results else "" for task in tasks]
        if any(cells):
            pairs = [(key_of(task), keys.same_share(task)) for task in tasks]
            lines.append(
                [label, *cells, over_tasks([difference(results, one, other) for one, other in pairs if one != other])]
            )
    return markdown_table(["", *tasks, "minus the same share, 7%"], lines)


def claims_of(results: Results, keys: Keys) -> dict[str, tuple[KeyOf, KeyOf]]:
    """The claims of the method: each compares one variant with another."""
    claims: dict[str, tuple[KeyOf, KeyOf]] = {}
    for budget in sorted(values_in(results, name="parameter_budget")):
        colora, share, rank = (
            partial(key_of, budget=budget) for key_of in (keys.colora, keys.same_share, keys.same_rank)
        )
        floor = partial(colora, min_rank=1)
        claims |= {
            f"CoLoRA minus the same share everywhere, both {budget:g}": (colora, share),
            f"CoLoRA minus the same rank everywhere, both {budget:g}": (colora, rank),
            f"CoLoRA with at least rank 1 minus the same rank everywhere, both {budget:g}": (floor, rank),
            f"CoLoRA with at least rank 1 minus CoLoRA, both {budget:g}": (floor, colora),
        }
    small, floor = partial(keys.colora, budget=0.02), partial(keys.colora, min_rank=1)
    claims |= {
        "CoLoRA with at least rank 1, 0.02, minus the same rank everywhere, 0.07": (
            partial(small, min_rank=1),
            keys.same_rank,
        ),
        "CoLoRA with at least rank 1, 0.07, minus full tuning": (floor, keys.full),
        "CoLoRA, 0.02, minus the same rank everywhere, 0.07": (small, keys.same_rank),
        "CoLoRA, 0.02, minus the same share everywhere, 0.07": (small, keys.same_share),
        "CoLoRA, 0.07, minus full tuning": (keys.colora, keys.full),
    }
    others = [name for name in values_in(results, name="estimator") if name != keys.default]
    return claims | {
        f"{keys.default} minus {name}, 0.07": (keys.colora, partial(keys.colora, estimator=name)) for name in others
    }


def budget_rows(results: Results, keys: Keys) -> dict[str, KeyOf]:
    """Rows of the table of budgets."""
    rows: dict[str, KeyOf] = {}
    for budget in sorted(values_in(results, name="parameter_budget")):
        rows |= {
            f"the same share everywhere, {budget:g}": partial(keys.same_share, budget=budget),
            f"the same rank everywhere, {budget:g}": partial(keys.same_rank, budget=budget),
            f"CoLoRA, {budget:g}": partial(keys.colora, budget=budget),
            f"CoLoRA, at least rank 1, {budget:g}": partial(keys.colora, budget=budget, min_rank=1),
        }
    return rows


def seconds_table(scores: dict[str, list[ContributionScores]], results: Results, keys: Keys) -> str:
    """Markdown: seconds of each estimator, also as a share of the fine-tuning that it precedes."""
    tunings = [result.seconds for key, result in results.items() if key == keys.colora(key[0])]
    rows = []
    for name, own in scores.items():
        seconds = mean(score.seconds for score in own)
        share = f"{seconds / mean(tunings):.0%}" if tunings else ""
        errors = [score.completeness_error for score in own if score.completeness_error is not None]
        rows.append([name, f"{seconds:.1f}", share, f"{mean(errors):.1%}" if errors else ""])
    return markdown_table(["estimator", "seconds", "share of the fine-tuning", "completeness error"], rows)


# ----------------------------------------------------------------------------------------------------------- scores


def load_scores(folder: Path) -> dict[tuple[str, str, int], ContributionScores]:
    """The scores in a folder, by task, estimator and seed."""
    found = {}
    for path in sorted(folder.glob("*-*-seed*.json")):
        task, estimator, seed = path.stem.rsplit("-", 2)
        found[task, estimator, int(seed.removeprefix("seed"))] = ContributionScores.load(path)
    return found


def rank_correlation(one: ContributionScores, other: ContributionScores) -> float:
    """Spearman's correlation over the layers."""
    return float(np.corrcoef(*(_ranks(np.array(list(scores.scores.values()))) for scores in (one, other)))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks of values, 1 for the smallest; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def correlation_table(scores: dict[tuple[str, str, int], ContributionScores], rows: list[tuple[str, str]]) -> str:
    """Markdown: mean over the seeds of the rank correlation between (task, estimator) and (task, estimator)."""

    def correlation(one: tuple[str, str], other: tuple[str, str]) -> str:
        values = [
            rank_correlation(own, scores[(*other, seed)])
            for (task, estimator, seed), own in scores.items()
            if (task, estimator) == one and (*other, seed) in scores
        ]
        return f"{mean(values):.2f}" if values else ""

    names = [f"{task}, {estimator}" for task, estimator in rows]
    lines = ([name, *(correlation(row, column) for column in rows)] for row, name in zip(rows, names, strict=True))
    return markdown_table(["", *names], lines)


# ------------------------------------------------------------------------------------------------------------ plots


def plot_budgets(results: Results, tasks: list[str], keys: Keys, path: Path) -> None:
    """Draws PSNR over the budget."""
    curves = {
        "CoLoRA": keys.colora,
        "CoLoRA, at least rank 1": partial(keys.colora, min_rank=1),
        "the same share": keys.same_share,
        "the same rank": keys.same_rank,
        "full tuning": keys.full,
    }
    budgets = sorted(values_in(results, name="parameter_budget"))
    plot_curves(path, results, tasks, curves, budgets, "trained share of the weights", log_base=10)


def plot_betas(results: Results, tasks: list[str], keys: Keys, path: Path) -> None:
    """Draws PSNR over beta."""

    def key_of(task: str, beta: float) -> Key:
        return keys.colora(task, beta=beta) if beta else keys.same_share(task)

    betas = sorted({0.0, *(key[4] for key in results if key[3] == keys.default)})
    plot_curves(path, results, tasks, {"CoLoRA, 7%": key_of}, betas, "beta (0: the same share)")


# ----------------------------------------------------------------------------------------------------------- report


def sections(
    results: Results, scores: dict[tuple[str, str, int], ContributionScores], tasks: list[str], keys: Keys
) -> dict[str, str]:
    """Markdown of each part of the report, by its title."""
    by_estimator: dict[str, list[ContributionScores]] = {}
    for (_, estimator, _), own in scores.items():
        by_estimator.setdefault(estimator, []).append(own)
    estimators = {"full tuning": keys.full, "the same share everywhere": keys.same_share} | {
        f"CoLoRA, {name}": partial(keys.colora, estimator=name) for name in values_in(results, name="estimator")
    }
    betas = {"0 (the same share)": keys.same_share} | {
        f"{beta:g}": partial(keys.colora, beta=beta)
        for beta in sorted({key[4] for key in results if key[3] == keys.default})
    }
    others = {f"scores of {other}": partial(keys.colora, scores_of=other) for other in tasks}
    others["mean of the others' scores"] = lambda task: keys.colora(task, scores_of=others_of(task, tasks))
    compared = [(task, keys.default) for task in tasks]
    compared += [(tasks[0], name) for name in by_estimator if name != keys.default]
    return {
        "Differences, paired by seed": differences_table(results, tasks, claims_of(results, keys)),
        f"Estimators, 7%, beta {keys.beta:g} (fisher: half of it)": table(results, tasks, estimators, keys),
        "Time of the scores": seconds_table(by_estimator, results, keys),
        "Budgets": f"{table(results, tasks, budget_rows(results, keys), keys)}\n\n![](budgets.png)",
        "Beta, 7%": f"{table(results, tasks, betas, keys)}\n\n![](betas.png)",
        "Scores of another task, 7%": table(results, tasks, others, keys),
        "Rank correlation of the scores": correlation_table(scores, compared),
    }


def write_report(folder: Path) -> str:
    """Writes the report, budgets.png and betas.png into `folder`; returns the text."""
    cells, settings = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (CELLS_FILE, SETTINGS_FILE))
    results, scores = results_of(cells, SETTINGS, settings["tuning_seed"]), load_scores(folder / SCORES_FOLDER)
    keys, tasks = Keys(settings["default_estimator"], settings["beta"]), values_in(results, name="task")
    plot_budgets(results, tasks, keys, folder / "budgets.png")
    plot_betas(results, tasks, keys, folder / "betas.png")
    text = (
        "Made by `python -m examples.experiments.contributions.run`. Test PSNR in dB: mean ± standard deviation over "
        "the seeds (their number), at the learning rate that was best for the method on held-out training pairs with "
        f"another seed. {settings['train_pairs']} pairs, {settings['max_train_steps']} steps of "
        f"{settings['per_device_train_batch_size']} x {settings['resolution']}, measured on the centres of the test "
        f"images ({settings['evaluated_size']} px). Differences are paired by seed, with their standard error over "
        f"the seeds. faig walks to a network that was tuned in full at {settings['faig']['learning_rate']:g}.\n\n"
    )
    parts = sections(results, scores, tasks, keys)
    text += "\n\n".join(f"## {title}\n\n{body}" for title, body in parts.items())
    write_text(folder / REPORT_FILE, text + "\n")
    return text
