"""The report of the ways to begin: paired differences to PEFT's LoRA, and means of complete rows alone."""

import pytest

from examples.experiments.start.report import report
from examples.experiments.start.ways import TITLES, WAYS


def cell(way, rate, psnr, task="a", seed=0):
    shared = {"max_train_steps": 3, "per_device_train_batch_size": 2, "resolution": 32, "parameter_budget": 0.07,
              "validation_pairs": 4}  # fmt: skip
    return {"way": way, "learning_rate": rate, "psnr": psnr, "task": task, "seed": seed, **shared}


def test_the_reference_is_pefts_lora_at_its_best_rate_and_differences_are_paired():
    cells = [cell("peft_lora", 3e-3, 20.0), cell("peft_lora", 3e-3, 30.0, seed=1)]
    cells += [cell("peft_lora", 6e-3, 20.5), cell("peft_lora", 6e-3, 30.1, seed=1), cell("peft_lora", 6e-3, 0.0, "b")]
    cells += [cell("aligned", 6e-3, 21.0), cell("aligned", 6e-3, 30.2, seed=1), cell("aligned", 6e-3, 7.0, "c")]
    cells.append(cell("aligned", 6e-3, 0.4, "b"))
    text = report(cells)
    assert "minus that of PEFT's LoRA at 0.006" in text
    assert "| way | learning rate | a | b | mean | draws |" in text  # c has nothing to be compared with
    assert "| CoLoRA, A along the gradient | 0.006 | +0.30 | +0.40 | +0.35 ± 0.05 | 3 |" in text, (
        "tasks weigh alike, however many draws"
    )
    assert "| PEFT's LoRA | 0.003 | -0.30 |  | -0.30 ± 0.20 | 2 |" in text


def test_without_pefts_lora_the_report_says_so():
    assert report([cell("aligned", 6e-3, 21.0)]).startswith("No cells of PEFT's LoRA")


def test_what_failed_is_in_the_report():
    cells = [cell("peft_lora", 3e-3, 20.0), {**cell("aligned", 6e-3, 0.0, seed=1), "failed": "infinite"}]
    del cells[1]["psnr"]
    assert "Failed: a, aligned, 0.006, seed 1." in report(cells)


def test_means_by_rate_are_of_ways_that_have_every_draw():
    cells = [cell("peft_lora", rate, psnr, task) for rate, psnr in ((3e-3, 20.0), (6e-3, 21.0)) for task in "ab"]
    cells += [cell("colora", 3e-3, 21.5, "a"), cell("colora", 3e-3, 20.9, "b"), cell("aligned", 3e-3, 30.0, "a")]
    table = report(cells).split("The means by learning rate:\n\n")[1]
    assert table.splitlines() == [
        "|  | 0.003 | 0.006 |",
        "|---|---|---|",
        "| PEFT's LoRA | -1.00 ± 0.00 | 0 |",
        "| CoLoRA | +0.20 ± 0.30 |  |",
    ]


def test_other_pairs_under_the_name_of_a_task_are_refused():
    cells = [cell("peft_lora", 3e-3, 20.0) | {"data": "one"}, cell("colora", 3e-3, 20.0) | {"data": "two"}]
    with pytest.raises(ValueError, match="task 'a' was run with other pairs:"):
        report(cells)


def test_every_way_has_a_title_of_its_own():
    assert TITLES.keys() == WAYS.keys() and len(set(TITLES.values())) == len(TITLES)
