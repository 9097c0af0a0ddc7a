"""The study of contributions: its plan, its scores and its report, then the script launched."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from support.examples import write_pairs
from support.experiments import launch

from colora_peft import ContributionScores
from examples.experiments.contributions import plan, report, run
from examples.experiments.grid.cells import PairCentres


def arguments(**settings):
    return plan.StudyArguments(train_dirs=["a/train", "b/train"], **settings)


def test_plan_runs_every_variant_once_and_colora_in_every_question():
    everything = plan.plan(arguments())
    assert len(everything) == len(set(everything))
    for question in ("estimators", "budgets", "floor", "betas", "transfer"):
        own = plan.plan(arguments(questions=[question]))
        assert set(own) <= set(everything)
        for task in ("a", "b"):
            assert any(v.task == task and v.method == "colora" for v in own)
    transfers = plan.plan(arguments(questions=["transfer"]))
    assert {(v.task, v.scores_of) for v in transfers} == {
        (x, y) for x in "ab" for y in ("a", "b", "b" if x == "a" else "a")
    }


def test_variants_run_at_the_rate_of_their_method():
    """The rate is that of the nearest tuned budget, whatever the scores and the exponent."""
    args = arguments()
    default = plan.colora(args, "a")
    cases = {
        plan.Variant("a", "lora", 0.01): plan.Variant("a", "lora", 0.02),
        plan.Variant("a", "full"): plan.Variant("a", "full"),
        default._replace(estimator="faig"): default,
        default._replace(parameter_budget=0.14, beta=1.0): default,
        default._replace(min_rank=1, beta=1.0): default._replace(min_rank=1),
    }
    assert {variant: variant.tuned_as(args) for variant in cases} == cases


class WithNames(list):
    names = ("picture",)


@pytest.mark.parametrize("size", [2, 3, 50])
def test_centres_of_pairs(size):
    pairs = WithNames([(torch.rand(3, 5, 8), torch.rand(3, 5, 8))])
    degraded, target = PairCentres(pairs, size)[0]
    height, width = min(size, 5), min(size, 8)
    top, left = (5 - height) // 2, (8 - width) // 2
    assert torch.equal(degraded, pairs[0][0][:, top : top + height, left : left + width])
    assert torch.equal(target, pairs[0][1][:, top : top + height, left : left + width])


def test_random_scores_are_the_same_scores_elsewhere(monkeypatch, tmp_path):
    scores = {f"layer{i}": float(i) for i in range(50)}
    measured = ContributionScores(scores=scores, method="probe", num_batches=1, loss_start=1.0)
    monkeypatch.setattr(run, "measure", lambda *_: measured)
    monkeypatch.setattr(ContributionScores, "save", lambda *_: None)
    monkeypatch.setattr(ContributionScores, "load", lambda *_: measured)
    variant = plan.Variant("a", "colora", 0.07, plan.RANDOM, 0.5, "a")
    dealt = [run.contributions_of(arguments(output_dir=str(tmp_path)), variant, seed, None) for seed in (0, 0, 1)]
    assert dealt[0].scores == dealt[1].scores != dealt[2].scores
    assert list(dealt[0].scores) == list(scores) and sorted(dealt[0].scores.values()) == sorted(scores.values())
    assert dealt[0].scores != scores


def test_scores_of_the_others_leave_the_own_task_out(monkeypatch, tmp_path):
    tasks = {"a": {"x": 1.0, "y": 0.0}, "b": {"x": 3.0, "y": 1.0}, "c": {"x": 0.0, "y": 8.0}}

    def fake(args, task, *_):
        return ContributionScores(scores=tasks[task], method="gradient", num_batches=1, loss_start=1.0)

    monkeypatch.setattr(run, "measure", fake)
    args = plan.StudyArguments(train_dirs=["a/train", "b/train", "c/train"], output_dir=str(tmp_path))
    variant = plan.colora(args, "a")._replace(scores_of=report.others_of("a", ["c", "b", "a"]))
    assert run.contributions_of(args, variant, 0, None).scores == {"x": 0.375, "y": 0.625}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": [100]}, "--tuning_seed 100 is one of --seeds"),
        ({"seeds": [0, 0]}, "--seeds must list at least one value and none twice"),
        ({"train_dirs": ["x/a/train", "y/a/train"]}, "--train_dirs must list .* none twice, got \\['a', 'a'\\]"),
        ({"questions": ["why"]}, "no question 'why'"),
    ],
)
def test_bad_input_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        plan.plan(plan.StudyArguments(**{"train_dirs": ["a/train"], **settings}))


@pytest.mark.parametrize("ties", [False, True])
def test_ranks_are_those_of_spearman(ties):
    generator = np.random.default_rng(0)
    one, other = (generator.integers(0, 6 if ties else 10**6, 30).astype(float) for _ in range(2))
    ranks = [report._ranks(values) for values in (one, other)]
    assert np.corrcoef(*ranks)[0, 1] == pytest.approx(spearmanr(one, other).statistic)


@pytest.mark.slow
def test_launched_study_answers_every_question_and_a_second_call_runs_nothing(tmp_path, tiny_nafnet):
    folders = []
    for task, count in (("swapped", 6), ("other", 7)):
        folders.append(str(write_pairs(tmp_path / task / "train", count)))
        write_pairs(tmp_path / task / "test", 2)
    command = ["contributions.run", "--train_dirs", *folders, "--output_dir", tmp_path / "study", "--train_pairs", 3,
               "--validation_pairs", 2, "--max_train_steps", 1, "--resolution", 32, "--per_device_train_batch_size", 1,
               "--seeds", 0, 1, "--learning_rates", "1e-3", "--tuned_budgets", 0.3, "--budgets", 0.02, "--betas", 1,
               "--estimators", "random", "--default_estimator", "gradient",
               "--model_name_or_path", tiny_nafnet]  # fmt: skip
    done = launch(*command)
    assert done.returncode == 0, done.stderr
    cells = json.loads((tmp_path / "study" / "cells.json").read_text())
    assert all(math.isfinite(cell["psnr"]) for cell in cells)
    text = (tmp_path / "study" / "report.md").read_text()
    for title in (
        "CoLoRA, gradient",
        "CoLoRA, random",
        "CoLoRA, 0.02",
        "scores of other",
        "| 1 |",
        "at least rank 1, 0.3",
    ):
        assert title in text
    for image in ("budgets.png", "betas.png"):
        assert (tmp_path / "study" / image).stat().st_size > 5000
    other = launch(*command, "--resolution", 16)
    assert other.returncode == 1 and "cells with resolution 32, not 16" in other.stderr
    again = launch(*command)
    assert again.returncode == 0 and json.loads((tmp_path / "study" / "cells.json").read_text()) == cells
    assert (tmp_path / "study" / "report.md").read_text() == text
