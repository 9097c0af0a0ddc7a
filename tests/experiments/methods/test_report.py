"""The report of the comparison: claims paired by draw, means of complete rows alone, and what failed."""

import json

import pytest
from support.experiments import method_cell as cell

from examples.experiments.methods import report


def write_cells(folder, cells, **settings):
    (folder / "cells.json").write_text(json.dumps(cells))
    shared = {"tuning_seed": 100, "tuned_at": 16, "max_train_steps": 1, "per_device_train_batch_size": 1}
    (folder / "settings.json").write_text(json.dumps({**shared, "resolution": 8, "evaluated_size": 16, **settings}))


FAILED = {"task": "a", "train_pairs": 16, "network": "none", "method": "full", "learning_rate": 8e-3, "seed": 0,
          "failed": "infinite"}  # fmt: skip


def test_report_has_the_claims_and_says_what_failed(tmp_path):
    # The network that is tuned in all ways is not the first in the file.
    cells = [cell(seed, 19.0 + seed, "single") for seed in (0, 1)] + [cell(seed, 20.0 + seed) for seed in (0, 1)]
    cells += [cell(seed, 20.5 + seed, method="colora", parameter_budget=0.07) for seed in (0, 1)]
    write_cells(tmp_path, [*cells, FAILED])
    text = report.write_report(tmp_path)
    assert (tmp_path / "report.md").read_text() == text
    assert "| single minus prod, both tuned in full | -1.00 ± 0.00 (2) |" in text
    assert "| CoLoRA 0.07 minus full tuning | +0.50 ± 0.00 (2) |" in text
    assert "| prod + full | 0.205 ± 0.007 |" in text
    assert "in hundredths" in text and "| CoLoRA 0.07 minus full tuning | +0.50 ± 0.00 (2) |" in text.split("hundr")[1]
    assert "- a, 16 pairs, none + full, 0.008, seed 0: infinite" in text


def test_mean_matched_quality_is_of_the_tasks_that_have_it(tmp_path):
    found = {"psnr_mean_matched": 27.5, "psnr_input_mean_matched": 26.25}
    write_cells(tmp_path, [cell(0, 20.0, **found), {**cell(0, 20.0), "task": "b"}])
    text = report.write_report(tmp_path)
    assert "lack it. Input: a 26.25.\n" in text and "| prod + full | 27.50 |\n" in text
    write_cells(tmp_path, [cell(0, 20.0)])
    assert "brightness" not in report.write_report(tmp_path)


def test_what_runs_without_a_flag_is_not_tuned_and_is_compared_at_its_own_rate(tmp_path):
    def default(seed, psnr, budget):
        return cell(seed, psnr, method="colora_default", parameter_budget=budget, learning_rate=5e-3)

    cells = [default(seed, 20.5 + seed, 0.07) for seed in (0, 1)] + [
        default(seed, 20.4 + seed, 0.02) for seed in (0, 1)
    ]
    cells += [cell(seed, 20.0 + seed, method="peft_lora", parameter_budget=0.07) for seed in (0, 1)]
    write_cells(tmp_path, cells)
    text = report.write_report(tmp_path)
    assert "| CoLoRA 0.07 as finetune.py has it minus PEFT's LoRA | +0.50 ± 0.00 (2) |" in text
    assert "| CoLoRA as finetune.py has it, 0.02 minus 0.07 | -0.10 ± 0.00 (2) |" in text
    assert "| prod + colora_default 0.07 | 21.00 ± 0.71 (2) at 0.005 |" in text
    assert "CoLoRA with nothing tuned" not in text, "there is no full tuning beside it"
    same_loss = [cell(seed, 20.3 + seed, method="peft_lora_checkerboard", parameter_budget=0.07) for seed in (0, 1)]
    same_loss += [cell(seed, 20.6 + seed, method="full_checkerboard") for seed in (0, 1)]
    write_cells(tmp_path, [*cells, *same_loss])
    text = report.write_report(tmp_path)
    assert "| CoLoRA 0.07 as finetune.py has it minus PEFT's LoRA with the same loss | +0.20 ± 0.00 (2) |" in text
    assert "| CoLoRA 0.07 as finetune.py has it minus full tuning with the same loss | -0.10 ± 0.00 (2) |" in text
    plain = [{**default(seed, 20.2, 0.07), "method": "colora_plain"} for seed in (0, 1)]
    write_cells(tmp_path, [*cells, *plain])
    alone = "on mean absolute error alone"
    text = report.write_report(tmp_path)
    assert f"| CoLoRA 0.07 as finetune.py has it minus the same {alone} | +0.80 ± 0.50 (2) |" in text
    assert f"| CoLoRA 0.07 {alone} minus PEFT's LoRA | -0.30 ± 0.50 (2) |" in text
    write_cells(tmp_path, [*cells, *(cell(seed, 19.0 + seed) for seed in (0, 1))])
    assert "| CoLoRA, 2% budget | 20.90 | 20.90 |" in report.write_report(tmp_path)
    write_cells(tmp_path, [*cells, cell(0, 19.0)])
    assert "CoLoRA with nothing tuned" not in report.write_report(tmp_path), "full tuning has one draw of two"


def test_runs_at_a_rate_that_was_best_before_are_in_no_table(tmp_path):
    cells = [cell(100, 20.0), cell(100, 21.0, learning_rate=2e-3), cell(0, 50.0), cell(0, 19.0, learning_rate=2e-3)]
    write_cells(tmp_path, cells)
    text = report.write_report(tmp_path)
    assert "| prod + full | 19.00 (1) at 0.002 (edge) | 19.00 |" in text and "| prod + full | 0.190 |" in text


def test_a_report_of_failures_alone_names_them(tmp_path):
    write_cells(tmp_path, [FAILED])
    assert "none + full, 0.008, seed 0: infinite" in report.write_report(tmp_path)


def test_there_is_a_mean_only_of_the_same_draws(tmp_path):
    cells = [cell(seed, 10.0 * seed) for seed in (1, 2, 3)] + [cell(3, 29.0, method="bias")]
    write_cells(tmp_path, cells)
    text = report.write_report(tmp_path)
    assert "| prod + full | 20.00 ± 10.00 (3) at 0.001 | 20.00 |" in text
    assert "| prod + bias | 29.00 (1) at 0.001 |  |" in text


def test_seconds_of_two_machines_are_no_figure_of_one_way(tmp_path):
    cells = [cell(0, 20.0), cell(0, 20.0, method="bias")]
    write_cells(tmp_path, cells)
    assert "machine |" not in report.write_report(tmp_path)
    write_cells(tmp_path, [cells[0], *({**cells[1], "seed": seed, "hardware": own} for seed, own in enumerate("xy"))])
    text = report.write_report(tmp_path)
    assert "| prod + full | 7 | 50.00% | 2 | 0.0 | a laptop |" in text
    assert "| prod + bias | 7 | 50.00% |  |  | x and y |" in text


def test_a_way_with_another_loss_stands_at_the_rate_of_the_same_without_and_says_where_that_is_an_edge(tmp_path):
    tried = [cell(100, psnr, learning_rate=rate) for rate, psnr in ((1e-3, 20.0), (2e-3, 21.0))]
    lent = [cell(0, 30.0 * rate, method="full_checkerboard", learning_rate=rate) for rate in (1e-3, 2e-3)]
    write_cells(tmp_path, [*tried, cell(0, 19.0, learning_rate=2e-3), *lent])
    assert "| prod + full_checkerboard | 0.06 (1) at 0.002 (edge) | 0.06 |" in report.write_report(tmp_path)


def test_what_is_forgotten_is_told_task_by_task(tmp_path):
    cells = [cell(0, 20.0, psnr_old_task=24.0), cell(0, 20.0, method="bias", psnr_old_task=26.0)]
    cells.append({**cell(0, 20.0, psnr_old_task=30.0), "task": "b"})
    write_cells(tmp_path, cells)
    text = report.write_report(tmp_path)
    assert "| prod + full | 24.00 | 30.00 |" in text and "| prod + bias | 26.00 |  |" in text


def test_curves_and_radar_are_drawn_of_what_is_there(tmp_path):
    def cells_of(tasks, counts, method):
        return [
            {**cell(seed, 20.0 + count / 16 + seed, method=method), "task": task, "train_pairs": count}
            for task in tasks for count in counts for seed in (0, 1)
        ]  # fmt: skip

    write_cells(tmp_path, cells_of("abc", (16,), "full") + cells_of("abc", (16,), "bias"))
    text = report.write_report(tmp_path)
    assert (tmp_path / "radar-16.png").is_file() and "radar-16.png" in text
    assert not (tmp_path / "pairs.png").exists() and "pairs.png" not in text
    # A way without a second point is no reason for no curve.
    write_cells(tmp_path, cells_of("abc", (16, 32), "full") + cells_of("ab", (16,), "bias"))
    text = report.write_report(tmp_path)
    assert (tmp_path / "pairs.png").is_file() and "pairs.png" in text


def test_a_name_that_stands_for_two_networks_is_refused(tmp_path):
    cells = [cell(0, 20.0, weights="a"), cell(1, 20.0, weights="b")]
    (tmp_path / "cells.json").write_text(json.dumps(cells))
    (tmp_path / "settings.json").write_text(json.dumps({"tuning_seed": 100}))
    with pytest.raises(ValueError, match="network 'prod' was run with other weights"):
        report.write_report(tmp_path)


def test_report_without_cells_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no cells in"):
        report.write_report(tmp_path)
