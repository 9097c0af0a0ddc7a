"""Shorter runs are compared with all steps of PEFT's LoRA, on the tasks and draws that both have."""

import json

import pytest
from support.experiments import method_cell as cell

from examples.experiments.methods.steps import steps_table

BUDGETED = {"parameter_budget": 0.07}


def write(folder, cells, steps):
    folder.mkdir()
    (folder / "cells.json").write_text(json.dumps(cells))
    (folder / "settings.json").write_text(json.dumps({"tuning_seed": 100, "max_train_steps": steps}))
    return folder


def colora(seed, psnr, task):
    return cell(seed, psnr, method="colora_default", task=task, **BUDGETED)


def test_fewer_steps_are_compared_with_all_steps_of_pefts_lora(tmp_path):
    cells = [cell(seed, 20.0 + seed, method="peft_lora", task=task, **BUDGETED) for task in "ab" for seed in (0, 1)]
    cells += [colora(seed, 21.0 + 3 * seed, task) for task in "ab" for seed in (0, 1)]
    whole = write(tmp_path / "whole", cells, 200)
    shorter = [
        colora(0, 19.0, "a"),
        colora(1, 20.0, "a"),
        colora(0, 20.5, "b"),
        colora(1, 21.5, "b"),
        colora(0, 1, "c"),
    ]
    assert steps_table(whole, write(tmp_path / "shorter", shorter, 120)).splitlines()[2:] == [
        "| 200 | 100% | 22.50 | +2.00 ± 0.71 (2 tasks) |  |",
        "| 120 | 60% | 20.25 | -0.25 ± 0.00 (2 tasks) |  |",
    ]


def test_runs_of_two_numbers_of_pairs_are_refused(tmp_path):
    whole = write(tmp_path / "whole", [colora(0, 20.0, "a")], 200)
    shorter = [colora(0, 19.0, "a"), {**colora(0, 19.0, "a"), "train_pairs": 32}]
    with pytest.raises(ValueError, match="one number of pairs"):
        steps_table(whole, write(tmp_path / "shorter", shorter, 120))


def test_one_method_with_two_losses_is_refused(tmp_path):
    whole = write(tmp_path / "whole", [colora(0, 20.0, "a")], 200)
    shorter = write(tmp_path / "shorter", [{**colora(0, 19.0, "a"), "checkerboard_weight": 5.0}], 120)
    with pytest.raises(ValueError, match="method 'colora_default' was run with other checkerboard_weight"):
        steps_table(whole, shorter)


def test_folders_without_a_common_task_are_refused(tmp_path):
    whole = write(tmp_path / "whole", [colora(0, 20.0, "a")], 200)
    with pytest.raises(ValueError, match="has no task that"):
        steps_table(whole, write(tmp_path / "shorter", [colora(0, 19.0, "a")], 120))
