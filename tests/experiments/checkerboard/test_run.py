"""The comparison of weights on the checkerboard: its measure is of the pattern alone, its report of paired cells."""

import json

import pytest
import torch
from support.examples import EXAMPLES, write_pairs
from support.experiments import launch
from torch import nn

from examples.experiments.checkerboard import run


class Patterned(nn.Module):
    """Adds a pattern to images, of 4 x 4 pixels."""

    config = type("Config", (), {"pads_to_multiple": 4})

    def __init__(self, pattern):
        super().__init__()
        self.pattern = nn.Parameter(pattern)

    def forward(self, image):
        return image + self.pattern.tile(image.shape[-2] // 4, image.shape[-1] // 4)


def test_the_measure_is_the_pattern_in_grey_levels_whatever_the_image_shows():
    generator = torch.Generator().manual_seed(0)
    pairs = [(torch.rand(3, 128, 128, generator=generator),) * 2 for _ in range(2)]
    pattern = torch.randn(3, 4, 4, generator=generator) / 50
    pattern -= pattern.mean((-2, -1), keepdim=True)
    bare, patterned = (
        run.checkerboard_in_levels(pairs, Patterned(own))["checkerboard"] for own in (0 * pattern, pattern)
    )
    assert patterned == pytest.approx(255 * pattern.square().mean().sqrt().item(), rel=0.02)
    assert bare < 0.02 * patterned


def cell(task, weight, seed, psnr, **more):
    counts = dict.fromkeys(run.COUNTS, 4)
    return {"task": task, "checkerboard_weight": weight, "seed": seed, "psnr": psnr, "ssim": psnr / 100,
            "checkerboard": 1.0 + weight, **counts, **more}  # fmt: skip


def test_the_report_pairs_the_draws_and_has_a_mean_where_all_tasks_are():
    cells = [cell("a", 0.0, 0, 20.0), cell("a", 0.0, 1, 24.0), cell("a", 20.0, 1, 24.5), cell("b", 0.0, 0, 30.0)]
    text = run.report([*cells, cell("a", 5.0, 7, 40.0)])
    assert "| 20 | +0.50 |  |  |" in text and "| 5 |  |  |  |" in text, "no seed of weight 5 is in weight 0"
    assert "| 0 | +0.00 | +0.00 | +0.00 |" in text
    broken = cell("b", 20.0, 3, 1.0, also_failed="no memory")
    del broken["checkerboard"]
    text = run.report([*reversed(cells[:3]), cells[3], cell("b", 20.0, 0, 30.7), broken])
    assert "Failed: b, weight 20, seed 3: no memory" in text, "and the lowest weight is the base, whatever came first"
    assert "| 20 | +0.50 | +0.70 | +0.60 ± 0.10 |" in text and "| 20 | +0.005 | +0.007 | +0.006 ± 0.001 |" in text
    assert "| 20 | 21.00 | 21.00 | 21.00 |" in text


def test_several_learning_rates_are_refused():
    with pytest.raises(ValueError, match="--learning_rates takes one here, got 2"):
        run.CheckerboardArguments(data_dir="data", learning_rates=[1e-3, 2e-3])


def test_settings_of_the_committed_cells_are_those_of_the_defaults():
    committed = json.loads((EXAMPLES / "experiments" / "checkerboard" / "settings.json").read_text(encoding="utf-8"))
    names = (*run.COUNTS, "learning_rates", "evaluated_size", "parameter_budget")
    defaults = run.CheckerboardArguments(data_dir="data")
    assert {name: committed[name] for name in names} == {name: getattr(defaults, name) for name in names}


@pytest.mark.slow
def test_launched_comparison_runs_every_cell_once(tiny_nafnet, tmp_path):
    write_pairs(tmp_path / "data" / "a" / "train", 6, size=64)
    command = ["checkerboard.run", "--data_dir", tmp_path / "data", "--tasks", "a", "--weights", 0, 20,
               "--model_name_or_path", tiny_nafnet, "--parameter_budget", 0.3, "--seeds", 0,
               "--train_pairs", 3, "--validation_pairs", 2, "--max_train_steps", 1, "--resolution", 32,
               "--per_device_train_batch_size", 1, "--output_dir", tmp_path / "out"]  # fmt: skip
    for _ in range(2):
        done = launch(*command)
        assert done.returncode == 0, done.stderr
        cells = json.loads((tmp_path / "out" / "cells.json").read_text())
        assert [c["checkerboard_weight"] for c in cells] == [0, 20] and all("checkerboard" in c for c in cells)
    assert (tmp_path / "out" / "report.md").read_text() == run.report(cells)
