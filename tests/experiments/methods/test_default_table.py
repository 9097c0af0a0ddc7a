"""The table of CoLoRA without a flag beside others: means of the same tasks and draws alone."""

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


def test_others_with_the_loss_of_colora_have_a_line_where_they_have_all_its_tasks_and_draws():
    cells = cells_of("a", 20.0, 20.0, 18.0) + cells_of("b", 30.0, 31.0, 33.0)
    loss = [
        cell(seed, psnr, method="peft_lora_checkerboard", task=task, **BUDGETED)
        for seed in (0, 1)
        for task, psnr in (("a", 21.0), ("b", 32.0))
    ]
    assert lines(cells + loss[:-1]) == lines(cells), "one draw of one task is missing"
    (line,) = set(lines(cells + loss)) - set(lines(cells))
    assert line == "| PEFT's LoRA, loss of CoLoRA | 21.00 | 32.00 | 26.50 | 0.265 |"
    assert lines(cells + loss).index(line) == 5, "right above CoLoRA"
