"""Results of a tuned grid: rates, differences and their errors, from its cells."""

import pytest

from examples.experiments.grid import results as grid_results

SETTINGS = grid_results.Settings(("task", "method", "parameter_budget"), tuned_alike=("task", "method"))
TUNING = 100


def cell(rate, seed, psnr, **settings):
    shared = {"task": "a", "method": "lora", "parameter_budget": 0.07, "seconds": 1.0, "psnr": psnr}
    return {**shared, **settings, "learning_rate": rate, "seed": seed}


def failed(rate, seed):
    return {"task": "a", "method": "lora", "parameter_budget": 0.07, "learning_rate": rate, "seed": seed, "failed": ""}


def test_pairs_that_rates_were_chosen_on_are_not_in_the_results():
    cells = [cell(1e-3, TUNING, 90.0), cell(3e-3, TUNING, 91.0), cell(1e-2, TUNING, 80.0), failed(3e-2, TUNING)]
    cells += [cell(3e-3, 0, 19.0), cell(3e-3, 1, 18.0)]
    (result,) = grid_results.results_of(cells, SETTINGS, TUNING).values()
    assert result.learning_rate == 3e-3 and result.psnr == {0: 19.0, 1: 18.0} and not result.at_edge


def test_a_rate_at_the_edge_and_seeds_that_failed_are_said():
    cells = [cell(1e-3, TUNING, 20.0), cell(3e-3, TUNING, 21.0), cell(3e-3, 0, 19.0), failed(3e-3, 1)]
    (result,) = grid_results.results_of(cells, SETTINGS, TUNING).values()
    assert result.at_edge and result.failed == 1
    assert grid_results.spread(result) == "19.00 (1, 1 failed) at 0.003 (edge)"


def test_runs_at_a_rate_that_was_best_before_are_left_out():
    cells = [cell(1e-3, TUNING, 20.0), cell(3e-3, TUNING, 19.0), cell(1e-3, 0, 50.0), cell(1e-3, 1, 50.0)]
    cells += [cell(5e-4, TUNING, 21.0), cell(5e-4, 0, 18.0)]
    (result,) = grid_results.results_of(cells, SETTINGS, TUNING).values()
    assert result.learning_rate == 5e-4 and result.psnr == {0: 18.0} and result.at_edge


def test_runs_at_a_rate_that_is_the_best_no_more_are_no_result():
    cells = [cell(1e-3, TUNING, 20.0), cell(1e-3, 0, 18.0), cell(5e-4, TUNING, 21.0)]
    assert grid_results.results_of(cells, SETTINGS, TUNING) == {}


def test_two_rates_of_which_none_was_chosen_are_refused():
    with pytest.raises(ValueError, match="was run at two learning rates"):
        grid_results.results_of([cell(1e-3, 0, 20.0), cell(2e-3, 1, 20.0)], SETTINGS, TUNING)


def test_differences_are_paired_by_seed():
    cells = [cell(1e-3, seed, psnr) for seed, psnr in ((0, 10.0), (1, 20.0), (2, 30.0))]
    cells += [cell(1e-3, seed, psnr, method="colora") for seed, psnr in ((0, 11.0), (1, 21.0), (3, 50.0))]
    results = grid_results.results_of(cells, SETTINGS, TUNING)
    assert grid_results.difference(results, ("a", "colora", 0.07), ("a", "lora", 0.07)) == (1.0, 0.0, 2)
    assert grid_results.difference(results, ("b", "colora", 0.07), ("b", "lora", 0.07)) is None


def test_a_variant_that_was_not_tuned_takes_the_rate_of_the_nearest_budget():
    cells = [cell(rate, TUNING, psnr, parameter_budget=budget)
             for budget in (0.02, 0.07) for rate, psnr in ((1e-3, 20.0), (2e-3, 21.0), (4e-3, 19.0))]  # fmt: skip
    cells += [cell(2e-3, 0, 18.0, parameter_budget=0.01), cell(4e-3, 0, 18.0, parameter_budget=0.14)]
    results = grid_results.results_of(cells, SETTINGS, TUNING)
    assert [results["a", "lora", budget].at_edge for budget in (0.01, 0.14)] == [False, True]


def test_error_over_tasks_is_that_of_the_seeds():
    """Tasks that differ are not noise."""
    one, other = grid_results.Difference(1.0, 0.3, 3), grid_results.Difference(5.0, 0.4, 3)
    assert grid_results.over_tasks([one, other, None]) == "+3.00 ± 0.25 (2 tasks)"


def test_a_mean_without_the_largest_is_not_carried_by_one_task():
    found = [grid_results.Difference(value, error, 3) for value, error in ((-2.0, 9.0), (0.1, 0.3), (0.3, 0.4))]
    assert grid_results.without_largest([*found, None]) == "+0.20 ± 0.25 (2 tasks)"
    assert grid_results.without_largest(found[:2]) == "", "of two tasks neither carries the mean"
