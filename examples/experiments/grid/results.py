"""Results of a tuned grid, read off its cells: PSNR of each variant, and differences paired by seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from statistics import mean, stdev
from typing import Any, NamedTuple

from examples.experiments.grid.cells import Cell
from examples.experiments.grid.tuned import chosen_rate
from examples.experiments.tables import markdown_table

Key = tuple[object, ...]
"""Settings of a variant in the order of a grid's `Settings.names`; None for those that it does not have."""
KeyOf = Callable[[str], Key]
"""Returns the key of a variant on a task."""


class Settings(NamedTuple):
    """Names of the settings that make a variant of a grid."""

    names: tuple[str, ...]
    tuned_alike: tuple[str, ...]
    """Settings that a variant shares with the one whose rate it takes, that of the nearest `parameter_budget`."""
    lender: Callable[[Key], Key] = lambda key: key
    """Returns the variant in whose place another stands when rates are chosen, such as one with another loss."""

    def key(self, cell: Cell) -> Key:
        return tuple(cell.get(name) for name in self.names)

    def budget(self, key: Key) -> float | None:
        """The parameter budget of a variant."""
        return key[self.names.index("parameter_budget")]

    def tuned_like(self, key: Key, tuning: dict[Key, list[Cell]]) -> Key:
        """The variant whose learning rate another takes: of those that are tuned alike, the nearest in budget."""
        kind, lent = itemgetter(*map(self.names.index, self.tuned_alike)), self.lender(key)
        tuned = [other for other, tried in tuning.items() if tried and kind(other) == kind(lent)]
        if lent in tuned:
            return lent
        if not tuned:
            return key
        return min(tuned, key=lambda other: abs(math.log((self.budget(other) or 1) / (self.budget(key) or 1))))


class Result(NamedTuple):
    """Quality of a variant on a task, at its learning rate."""

    learning_rate: float
    at_edge: bool
    """Whether that is the lowest or highest rate that was tried: the best may lie outside."""
    psnr: dict[int, float]
    """Test PSNR (dB) by seed."""
    failed: int
    """Number of seeds whose run failed."""
    seconds: float
    """Seconds of training, mean over the seeds."""


Results = dict[Key, Result]


def values_in(results: Results, settings: Settings, name: str) -> list[Any]:
    """The different values of a setting, in order of first appearance."""
    index = settings.names.index(name)
    return [value for value in dict.fromkeys(key[index] for key in results) if value is not None]


def results_of(cells: Iterable[Cell], settings: Settings, tuning_seed: int) -> Results:
    """The result of each variant, over all seeds but the one that learning rates were chosen with.

    Runs at a rate that was best before more were tried are left out.

    Raises:
        ValueError: A variant whose rate was not chosen at its own budget was run at two.
    """
    groups: dict[Key, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(settings.key(cell), []).append(cell)
    tuning = {key: [cell for cell in own if cell["seed"] == tuning_seed] for key, own in groups.items()}
    results = {}
    for key, own in groups.items():
        like = settings.tuned_like(key, tuning)
        tried, runs = tuning[like], [cell for cell in own if cell["seed"] != tuning_seed]
        if tried and settings.budget(like) == settings.budget(key):
            runs = [cell for cell in runs if cell["learning_rate"] == chosen_rate(tried)]
        if len({cell["learning_rate"] for cell in runs}) > 1:
            raise ValueError(f"The variant {key} was run at two learning rates: delete the cells of one.")
        done = [cell for cell in runs if "psnr" in cell]
        if done:
            rate, rates = done[0]["learning_rate"], [cell["learning_rate"] for cell in tried]
            at_edge = len(rates) > 1 and rate in (min(rates), max(rates))
            psnr, seconds = {cell["seed"]: cell["psnr"] for cell in done}, mean(cell["seconds"] for cell in done)
            results[key] = Result(rate, at_edge, psnr, len(runs) - len(done), seconds)
    return results


def spread(result: Result) -> str:
    """Mean and standard deviation over the seeds, their number, and the learning rate."""
    values = list(result.psnr.values())
    text = f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"
    failed = f", {result.failed} failed" if result.failed else ""
    return f"{text} ({len(values)}{failed}) at {result.learning_rate:g}{' (edge)' if result.at_edge else ''}"


class Difference(NamedTuple):
    """Difference of two variants in dB, over the seeds that both have."""

    mean: float
    standard_error: float
    """NaN for a single seed."""
    count: int

    def __str__(self) -> str:
        spread = "" if math.isnan(self.standard_error) else f" ± {self.standard_error:.2f}"
        return f"{self.mean:+.2f}{spread} ({self.count})"


def difference(results: Results, key: Key, other: Key) -> Difference | None:
    """Difference of two variants on one task, paired by seed; None if they share no seed."""
    if key not in results or other not in results:
        return None
    one, two = results[key].psnr, results[other].psnr
    seeds = [seed for seed in one if seed in two]
    return paired_difference([one[seed] for seed in seeds], [two[seed] for seed in seeds]) if seeds else None


def paired_difference(one: Sequence[float], two: Sequence[float]) -> Difference:
    """Mean of the differences of two equally long sequences, with its standard error."""
    values = [a - b for a, b in zip(one, two, strict=True)]
    return Difference(mean(values), standard_error(values), len(values))


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean; NaN for a single value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def over_tasks(differences: list[Difference | None]) -> str:
    """The mean over the tasks that have a difference. Its error is that of the seeds: tasks are not a sample."""
    found = [difference for difference in differences if difference is not None]
    if not found:
        return ""
    error = math.hypot(*(difference.standard_error for difference in found)) / len(found)
    spread = "" if math.isnan(error) else f" ± {error:.2f}"
    return f"{mean(d.mean for d in found):+.2f}{spread} ({len(found)} task{'s' * (len(found) > 1)})"


def without_largest(differences: list[Difference | None]) -> str:
    """The mean over the tasks but the one that differs most, which so cannot carry it; empty for fewer than three."""
    found = [difference for difference in differences if difference is not None]
    largest = max(found, key=lambda difference: abs(difference.mean), default=None)
    return over_tasks([difference for difference in found if difference is not largest]) if len(found) > 2 else ""


def differences_table(
    results: Results, tasks: Sequence[str], claims: dict[str, tuple[KeyOf, KeyOf]], head: str = "dB"
) -> str:
    """Markdown: a line for each claim that some task has, as one variant minus another; empty if there is none."""
    rows = []
    for label, (one, other) in claims.items():
        found = [difference(results, one(task), other(task)) for task in tasks]
        if any(found):
            rows.append([label, *(d or "" for d in found), over_tasks(found), without_largest(found)])
    return markdown_table([head, *tasks, "mean", "mean without the largest"], rows) if rows else ""
