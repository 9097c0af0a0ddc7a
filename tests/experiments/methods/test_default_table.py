"""The table of CoLoRA without a flag beside others: means of the same tasks and draws alone."""

import pytest
from support.experiments import method_cell as cell

from examples.experiments.grid.results import results_of
from examples.experiments.methods.default_table import default_table
from examples.experiments.methods.results import SETTINGS, of_ssim

INPUTS = {"a": (10.0, 0.1), "b": (20.0, 0.2), "c": (30.0, 0.3)}
BUDGETED = {"parameter_budget": 0.07}


def lines(cells):
    results = results_of(cells, SETTINGS, tuning_seed=100)
    return default_table(results, of_ssim(results, cells), INPUTS, list(INPUTS), 16).splitlines()


def cells_of(task, default, peft, full):
    return [
        one
        for seed in (0, 1)
        for one in (
            cell(seed, default + seed, method="colora_default", task=task, **BUDGETED),
            cell(seed, peft - seed, method="peft_lora", task=task, **BUDGETED),
            cell(seed, full, task=task),
        )
    ]


def test_it_is_of_the_tasks_that_have_all_ways():
    cells = cells_of("a", 20.0, 20.0, 18.0) + cells_of("b", 30.0, 31.0, 33.0) + cells_of("c", 50.0, 1.0, 2.0)[:-1]
    assert lines(cells) == [
        "|  | a | b | mean | mean SSIM |",
        "|---|---|---|---|---|",
        "| input | 10.00 | 20.00 | 15.00 | 0.150 |",
        "| full fine-tuning | 18.00 | 33.00 | 25.50 | 0.255 |",
        "| PEFT's LoRA | 19.50 | 30.50 | 25.00 | 0.250 |",
        "| CoLoRA, 7% budget | 20.50 | 30.50 | 25.50 | 0.255 |",
    ]
    assert lines(cells[1:2]) == [] == lines(cells[:1])


@pytest.mark.parametrize(
    ("method", "budget", "name"),
    [
        ("peft_lora_checkerboard", 0.07, "PEFT's LoRA, loss of CoLoRA"),
        ("full_checkerboard", None, "full fine-tuning, loss of CoLoRA"),
        ("decoder", None, "decoder alone"),
        ("bias", None, "biases alone"),
    ],
)
def test_other_ways_have_a_line_where_they_have_all_tasks_and_draws_of_colora(method, budget, name):
    cells = cells_of("a", 20.0, 20.0, 18.0) + cells_of("b", 30.0, 31.0, 33.0)
    own = {} if budget is None else {"parameter_budget": budget}
    more = [
        cell(seed, psnr, method=method, task=task, **own)
        for seed in (0, 1)
        for task, psnr in (("a", 21.0), ("b", 32.0))
    ]
    assert lines(cells + more[:-1]) == lines(cells), "one draw of one task is missing"
    (line,) = set(lines(cells + more)) - set(lines(cells))
    assert line == f"| {name} | 21.00 | 32.00 | 26.50 | 0.265 |"
    assert lines(cells + more).index(line) == 5, "right above CoLoRA"
