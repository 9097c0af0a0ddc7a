"""Learning rates are chosen on held-out training pairs with a seed of their own; nothing is run twice."""

import math
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from support.examples import write_pairs

from colora_peft.training.loop import TrainingDiverged
from examples.experiments.grid import tuned as tuned_grid
from examples.experiments.grid.cells import CellFile

TUNING = 100


class Named(NamedTuple):
    name: str
    extra: int | None = None


def grid(tmp_path, run_cell):
    args = SimpleNamespace(learning_rates=[1e-3, 3e-3, 2e-3], tuning_seed=TUNING, seeds=[5, 1])
    file = CellFile(tmp_path / "cells.json")
    return tuned_grid.TunedGrid(args, file, lambda variant: Named(variant.name[0]), run_cell)


def test_a_variant_runs_its_seeds_at_the_rate_that_was_best_for_what_it_is_tuned_as(tmp_path):
    ran = []

    def run_cell(variant, rate, seed):
        ran.append((variant.name, rate, seed))
        return {"psnr": -abs(math.log(rate / (3e-3 if variant.name[0] == "x" else 1e-3)))}

    runs = grid(tmp_path, run_cell)
    runs.run([Named("x"), Named("xx"), Named("y")])
    rates = [1e-3, 3e-3, 2e-3]
    assert ran == [
        *(("x", rate, TUNING) for rate in rates), ("x", 3e-3, 5), ("x", 3e-3, 1),
        ("xx", 3e-3, 5), ("xx", 3e-3, 1),
        *(("y", rate, TUNING) for rate in rates), ("y", 1e-3, 5), ("y", 1e-3, 1),
    ]  # fmt: skip
    grid(tmp_path, run_cell).run([Named("y"), Named("xx")])
    assert len(ran) == 12


def test_a_variant_with_a_rate_of_its_own_runs_its_seeds_at_that_alone(tmp_path):
    runs = grid(tmp_path, lambda variant, rate, seed: {"psnr": rate})
    runs = runs._replace(fixed_rate=lambda variant: 0.5 if variant.name == "x" else None)
    runs.run([Named("x"), Named("y")])
    found = {"x": [], "y": []}
    for cell in runs.file.cells:
        found[cell["name"]].append((cell["learning_rate"], cell["seed"]))
    assert found["x"] == [(0.5, 5), (0.5, 1)]
    assert found["y"] == [(1e-3, TUNING), (3e-3, TUNING), (2e-3, TUNING), (3e-3, 5), (3e-3, 1)]


def test_a_variant_with_rates_of_its_own_is_tried_at_those_alone(tmp_path):
    runs = grid(tmp_path, lambda variant, rate, seed: {"psnr": rate})
    runs = runs._replace(own_rates=lambda variant: [5e-4, 2.5e-4] if variant.name == "x" else None)
    runs.run([Named("x"), Named("y")])
    tried = {"x": [], "y": []}
    for cell in runs.file.cells:
        if cell["seed"] == TUNING:
            tried[cell["name"]].append(cell["learning_rate"])
    assert tried == {"x": [5e-4, 2.5e-4], "y": [1e-3, 3e-3, 2e-3]}
    assert {cell["learning_rate"] for cell in runs.file.cells if cell["name"] == "x" and cell["seed"] == 5} == {5e-4}


def test_rates_that_are_tried_later_are_compared_with_those_before(tmp_path):
    runs = grid(tmp_path, lambda variant, rate, seed: {"psnr": -abs(rate - 5e-3)})
    runs.run([Named("x")])
    for rates, best in (([1e-4], 3e-3), ([4e-3], 4e-3)):
        later = grid(tmp_path, runs.run_cell)
        later.args.learning_rates = rates
        before = len(later.file.cells)
        later.run([Named("x")])
        new = [(cell["learning_rate"], cell["seed"]) for cell in later.file.cells[before:]]
        assert new == [(rates[0], TUNING), *([(best, 5), (best, 1)] if best in rates else [])]


def test_runs_that_diverge_are_cells_and_a_method_whose_rates_all_fail_is_left_out(tmp_path, capsys):
    def run_cell(variant, rate, seed):
        if variant.name == "y" or rate == 3e-3:
            raise TrainingDiverged("infinite") if variant.name == "x" else ValueError("the budget is too small")
        return {"psnr": rate}

    runs = grid(tmp_path, run_cell)
    runs.run([Named("x"), Named("y")])
    failed = [cell for cell in runs.file.cells if "failed" in cell]
    assert [(cell["name"], cell["learning_rate"]) for cell in failed] == [
        ("x", 3e-3), ("y", 1e-3), ("y", 3e-3), ("y", 2e-3)
    ]  # fmt: skip
    assert {cell["learning_rate"] for cell in runs.file.cells if cell["seed"] != TUNING} == {2e-3}
    assert "left out, as every learning rate failed" in capsys.readouterr().out


def test_a_variant_is_no_other_that_has_more_settings(tmp_path):
    runs = grid(tmp_path, lambda variant, rate, seed: {"psnr": variant.extra or 0})
    assert runs.cell(Named("x", extra=7), 1e-3, 0)["psnr"] == 7
    assert runs.cell(Named("x"), 1e-3, 0)["psnr"] == 0


def test_draws_are_disjoint_and_the_test_folder_is_for_the_other_seeds_alone(tmp_path):
    train_dir = str(write_pairs(tmp_path / "task" / "train", 9))
    test_dir = write_pairs(tmp_path / "task" / "test", 2)
    args = SimpleNamespace(tuning_seed=TUNING, resolution=8, validation_pairs=4, evaluated_size=16)
    of_test = {path.stem for path in (test_dir / "input").iterdir()}
    for train_pairs in (3, 8):
        for seed in (TUNING, 0, 1):
            drawn = tuned_grid.draw(args, train_dir, train_pairs, seed)
            trained = set(drawn.patches.pairs.names)
            assert len(trained) == (min(train_pairs, 5) if seed == TUNING else train_pairs)
            assert (set(drawn.evaluated.names) == of_test) == (seed != TUNING)
            if seed == TUNING:
                assert len(drawn.evaluated.names) == 4 and not trained & set(drawn.evaluated.names)
    assert len(tuned_grid.draw(args, train_dir, 9, 0).patches.pairs.names) == 9  # none is held out of a tested run
    with pytest.raises(ValueError, match=r"holds 9 pairs, too few to train on 10\.$"):
        tuned_grid.draw(args, train_dir, 10, 0)
    args.validation_pairs = 6
    with pytest.raises(ValueError, match="to hold 6 out for the rates .--validation_pairs"):
        tuned_grid.draw(args, train_dir, 3, TUNING)


def test_failed_cells_are_run_again_if_asked_and_then_gone(tmp_path):
    outcome = [RuntimeError("out of memory")]

    def run_cell(variant, rate, seed):
        if outcome:
            raise outcome[0]
        return {"psnr": 1.0}

    runs = grid(tmp_path, run_cell)
    runs.cell(Named("x"), 1e-3, 0)
    outcome.clear()
    assert runs.cell(Named("x"), 1e-3, 0)["failed"] == "out of memory"
    assert runs._replace(retry_failed=True).cell(Named("x"), 1e-3, 0)["psnr"] == 1.0
    assert [("failed" in cell) for cell in runs.file.cells] == [False]


def test_a_folder_of_cells_that_were_made_otherwise_is_refused(tmp_path):
    for _ in range(2):
        tuned_grid.check_same_settings(tmp_path, {"steps": 200, "size": 64})
    for other, named in (({"steps": 100, "size": 64}, "steps 200, not 100"), ({"steps": 200}, "size 64, not None")):
        with pytest.raises(ValueError, match=named):
            tuned_grid.check_same_settings(tmp_path, other)
