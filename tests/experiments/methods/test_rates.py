"""Tables of learning rates: the best of each task, and what one rate for all tasks loses."""

from support.experiments import method_cell as cell

from examples.experiments.methods import rates


def test_the_table_of_learning_rates_marks_the_best_and_says_what_failed():
    tried = [{**cell(100, psnr), "learning_rate": rate} for rate, psnr in ((1e-3, 20.0), (2e-3, 21.0))]
    failed = {name: value for name, value in tried[0].items() if name != "psnr"}
    line = rates.rates_table([*tried, {**failed, "learning_rate": 4e-3}]).splitlines()[2]
    assert line == "| a, 16 pairs, prod + full | 20.00 | **21.00** | failed |"


def tuned_at(task, psnr):
    return [cell(100, value, task=task, learning_rate=rate) for rate, value in psnr.items()]


def test_one_rate_for_all_tasks_is_weighed_against_the_best_of_each():
    cells = [*tuned_at("a", {1e-3: 20.0, 2e-3: 19.0}), *tuned_at("b", {1e-3: 30.0, 2e-3: 29.0, 4e-3: 50.0})]
    assert rates.one_rate_table(cells) == "", "two tasks are too few to choose on the others"
    cells += tuned_at("c", {1e-3: 37.0, 2e-3: 40.0})
    table = rates.one_rate_table(cells)
    # a and b lose 1 at 2e-3, c loses 3 at 1e-3; without c the others choose 1e-3, without a or b they choose 2e-3
    assert "| prod + full (3 tasks) | -1.00 | **-0.67** |  | -1.67 |" in table, "4e-3 was tried on one task alone"
    assert rates.one_rate_table([{**own, "psnr": own["psnr"] + 5.0} for own in cells]) == table
