"""Results of the comparison: which settings make a way to tune, and the values that they take."""

from __future__ import annotations

from examples.experiments.grid import results as grid_results
from examples.experiments.grid.cells import Cell
from examples.experiments.grid.results import Key, Results, Settings
from examples.experiments.methods.plan import NONE, WAYS


def _lender(key: Key) -> Key:
    method = key[3]
    return (*key[:3], WAYS[method].trains if WAYS[method].is_tuned else method, *key[4:])


SETTINGS = Settings(
    ("task", "train_pairs", "network", "method", "parameter_budget"),
    tuned_alike=("task", "network", "method", "parameter_budget"),
    lender=_lender,
)


def values_in(results: Results, name: str) -> list[object]:
    """The different values of a setting, in order of first appearance; new weights (NONE) last."""
    return sorted(grid_results.values_in(results, SETTINGS, name), key=lambda value: value == NONE)


def of_ssim(results: Results, tested: list[Cell], factor: float = 1) -> Results:
    """The same results with SSIM, times a factor, in place of PSNR."""
    found: dict[Key, dict[int, float]] = {}
    for cell in tested:
        found.setdefault(SETTINGS.key(cell), {})[cell["seed"]] = factor * cell["ssim"]
    return {key: results[key]._replace(psnr=values) for key, values in found.items()}
