"""examples/study_contributions.py and its report: the plan, what is read off the cells, then the script launched."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from conftest import EXAMPLES, load_example, write_pairs
from scipy.stats import spearmanr

study = load_example("study_contributions")
study_report = load_example("study_report")


def arguments(**settings):
    return study.StudyArguments(["a/train", "b/train"], **settings)


def test_plan_runs_every_variant_once_and_uniform_ranks_in_every_question():
    everything = study.plan(arguments())
    assert len(everything) == len(set(everything))
    for question in ("estimators", "budgets", "betas", "transfer"):
        own = study.plan(arguments(questions=[question]))
        assert set(own) <= set(everything)
        for task in ("a", "b"):
            assert any(v.task == task and v.method == "colora" for v in own)
    transfers = study.plan(arguments(questions=["transfer"]))
    assert {(v.task, v.scores_of) for v in transfers} == {(x, y) for x in "ab" for y in "ab"}


def cell(rate, seed, psnr, test_psnr, **settings):
    shared = {"task": "a", "method": "lora", "parameter_budget": 0.07, "seconds": 1.0}
    return {**shared, **settings, "learning_rate": rate, "seed": seed, "psnr": psnr, "test_psnr": test_psnr}


def test_learning_rate_is_chosen_on_held_out_pairs_of_the_first_seed_alone():
    cells = [
        cell(1e-3, 0, psnr=20.0, test_psnr=30.0),
        cell(3e-3, 0, psnr=21.0, test_psnr=19.0),
        cell(3e-3, 1, psnr=10.0, test_psnr=18.0),
        cell(1e-3, 1, psnr=25.0, test_psnr=31.0),
        {"task": "a", "method": "lora", "parameter_budget": 0.07, "learning_rate": 1e-2, "seed": 0, "failed": "nan"},
    ]
    (result,) = study_report.results_of(cells, first_seed=0).values()
    assert result.learning_rate == 3e-3 and result.psnr == {0: 19.0, 1: 18.0} and not result.at_edge


def test_a_rate_at_the_edge_and_seeds_that_diverged_are_said():
    failed = {key: value for key, value in cell(3e-3, 1, 0.0, 0.0).items() if "psnr" not in key} | {"failed": "nan"}
    cells = [cell(1e-3, 0, psnr=20.0, test_psnr=30.0), cell(3e-3, 0, psnr=21.0, test_psnr=19.0), failed]
    (result,) = study_report.results_of(cells, first_seed=0).values()
    assert result.at_edge and result.diverged == 1
    assert study_report.spread(result) == "19.00 (1, 1 diverged) at 0.003 (edge)"


def test_variants_run_at_the_rate_of_the_first_seed(monkeypatch):
    """And the report reads the same rate from their cells."""
    ran = []

    def fake(args, variant, rate, seed, file, accelerator):
        ran.append(cell(rate, seed, psnr=rate if seed == 5 else -rate, test_psnr=1.0, **variant.settings()))
        return ran[-1]

    monkeypatch.setattr(study, "cell_of", fake)
    args = arguments(seeds=[5, 1, 2], learning_rates=[1e-3, 3e-3, 2e-3])
    study.run_variants(args, [study.Variant("a", "lora", 0.07)], None, None)
    assert [(c["seed"], c["learning_rate"]) for c in ran] == [(5, 1e-3), (5, 3e-3), (5, 2e-3), (1, 3e-3), (2, 3e-3)]
    (result,) = study_report.results_of(ran, first_seed=5).values()
    assert result.learning_rate == 3e-3 and set(result.psnr) == {5, 1, 2}


def test_differences_are_paired_by_seed():
    cells = [cell(1e-3, seed, psnr, psnr) for seed, psnr in ((0, 10.0), (1, 20.0), (2, 30.0))]
    other = {"method": "colora", "estimator": "probe", "beta": 0.5, "scores_of": "a"}
    cells += [cell(1e-3, seed, psnr, psnr, **other) for seed, psnr in ((0, 11.0), (1, 21.0), (2, 31.0))]
    results, keys = study_report.results_of(cells, first_seed=0), study_report.Keys("probe", 0.5)
    difference = study_report.difference(results, keys.colora("a"), keys.uniform("a"))
    assert difference == (1.0, 0.0, 3)
    assert study_report.difference(results, keys.colora("b"), keys.uniform("b")) is None


def test_error_over_tasks_is_that_of_the_seeds():
    """Tasks that differ are no noise."""
    one, other = study_report.Difference(1.0, 0.3, 3), study_report.Difference(5.0, 0.4, 3)
    assert study_report.over_tasks([one, other, None]) == "+3.00 ± 0.25 (2 tasks)"


def test_random_scores_are_the_same_scores_elsewhere(monkeypatch, tmp_path):
    scores = {f"layer{i}": float(i) for i in range(50)}
    measured = study.ContributionScores(scores=scores, method="probe", num_batches=1, loss_start=1.0)
    monkeypatch.setattr(study, "measure", lambda *_: measured)
    monkeypatch.setattr(study.ContributionScores, "save", lambda *_: None)
    monkeypatch.setattr(study.ContributionScores, "load", lambda *_: measured)
    variant = study.Variant("a", "colora", 0.07, study.RANDOM, 0.5, "a")
    dealt = [study.contributions_of(arguments(output_dir=str(tmp_path)), variant, seed, None) for seed in (0, 0, 1)]
    assert dealt[0].scores == dealt[1].scores != dealt[2].scores
    assert list(dealt[0].scores) == list(scores) and sorted(dealt[0].scores.values()) == sorted(scores.values())
    assert dealt[0].scores != scores


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": [0, 0]}, "--seeds must list at least one value and none twice"),
        ({"train_dirs": ["x/a/train", "y/a/train"]}, "--train_dirs must list .* none twice, got \\['a', 'a'\\]"),
        ({"questions": ["why"]}, "no question 'why'"),
    ],
)
def test_bad_input_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        study.plan(study.StudyArguments(**{"train_dirs": ["a/train"], **settings}))


@pytest.mark.parametrize("ties", [False, True])
def test_ranks_are_those_of_spearman(ties):
    generator = np.random.default_rng(0)
    one, other = (generator.integers(0, 6 if ties else 10**6, 30).astype(float) for _ in range(2))
    ranks = [study_report._ranks(values) for values in (one, other)]
    assert np.corrcoef(*ranks)[0, 1] == pytest.approx(spearmanr(one, other).statistic)


@pytest.mark.slow
def test_launched_study_answers_every_question_and_a_second_call_runs_nothing(tmp_path):
    folders = []
    for task, count in (("swapped", 6), ("other", 7)):
        folders.append(str(write_pairs(tmp_path / task / "train", count)))
        write_pairs(tmp_path / task / "test", 2)
    command = [sys.executable, str(EXAMPLES / "study_contributions.py"), "--train_dirs", *folders, "--output_dir",
               str(tmp_path / "study"), "--train_pairs", "3", "--validation_pairs", "2", "--max_train_steps", "1",
               "--resolution", "32", "--per_device_train_batch_size", "1", "--seeds", "0", "1", "--learning_rates",
               "1e-3", "--budgets", "0.02", "--betas", "1", "--estimators", "random", "--default_estimator",
               "gradient"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cells = json.loads((tmp_path / "study" / "cells.json").read_text())
    assert all(math.isfinite(cell[key]) for cell in cells for key in ("psnr", "test_psnr"))
    report = (tmp_path / "study" / "report.md").read_text()
    for title in ("CoLoRA, gradient", "CoLoRA, random", "CoLoRA, 0.02", "scores of other", "| 1 |"):
        assert title in report
    for picture in ("budgets.png", "betas.png"):
        assert (tmp_path / "study" / picture).stat().st_size > 5000
    other = subprocess.run([*command, "--resolution", "16"], capture_output=True, text=True)
    assert other.returncode == 1 and "holds a study with resolution 32, not 16" in other.stderr
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and json.loads((tmp_path / "study" / "cells.json").read_text()) == cells
    assert (tmp_path / "study" / "report.md").read_text() == report
