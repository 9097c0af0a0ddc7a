"""The comparison of methods: its plan, then the script launched."""

import json

import pytest
from accelerate import Accelerator
from support.examples import EXAMPLES, write_pairs
from support.experiments import launch

from colora_peft.training import LEARNING_RATES
from examples.experiments.methods import plan, run
from examples.experiments.methods.plan import Variant
from examples.finetune import FinetuneArguments


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for task, count in (("a", 6), ("b", 7)):
        write_pairs(folder / task / "train", count)
        write_pairs(folder / task / "test", 2)
    return folder


def arguments(data_dir, **settings):
    return plan.BenchmarkArguments(**{"data_dir": str(data_dir), "tasks": ["a", "b"], **settings})


def test_the_shipped_network_is_tuned_where_none_is_named(data_dir, monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    (path,) = arguments(data_dir).network_paths().values()
    assert (EXAMPLES.parent / path).samefile(EXAMPLES / "checkpoints" / "nafnet-small-prod")


def test_plan_runs_every_variant_once_and_both_comparisons_meet_in_full_tuning(data_dir):
    args = arguments(data_dir, networks=["prod=x", "single=y", "none"], train_pairs=[3, 4], budgets=[0.07, 0.02])
    planned = plan.plan(args)
    assert len(planned) == len(set(planned)) == 2 * 2 * (3 + 2 + 4 * 2)
    assert {v.network for v in planned if v.method != "full"} == {"prod"}
    assert {v.network for v in planned if v.method == "full"} == {"prod", "single", "none"}
    assert {v.parameter_budget for v in planned if v.method in plan.BUDGETED} == {0.07, 0.02}
    assert all(v.tuned_as(args) == v._replace(train_pairs=16) for v in planned)
    borrowed = (Variant("a", 4, "prod", f"{method}_checkerboard", 0.07) for method in ("full", "peft_lora"))
    assert [v.tuned_as(args).method for v in borrowed] == ["full", "peft_lora"]
    lower = arguments(data_dir, full_learning_rates=[1e-4])
    assert {v.own_rates(lower) == [1e-4] for v in planned if v.method == "full"} == {True}
    assert (
        {v.own_rates(lower) for v in planned if v.method != "full"} == {None} == {v.own_rates(args) for v in planned}
    )


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"seeds": [100]}, ValueError, "--tuning_seed 100 is one of --seeds"),
        ({"seeds": [0, 0]}, ValueError, "--seeds must list at least one value and none twice"),
        ({"networks": ["none", "prod=x"]}, ValueError, "none not first"),
        ({"networks": ["prod=x", "single"]}, ValueError, "'single': write NAME=FOLDER"),
        ({"comparisons": ["both"]}, ValueError, "--comparisons has 'both': choose of pretraining, tuning"),
        ({"methods": ["full", "colra"]}, ValueError, "--methods has 'colra': choose of"),
        ({"budgets": [7.0]}, ValueError, "--budgets has 7, which is no share"),
        ({"full_learning_rates": []}, ValueError, "--full_learning_rates must list at least one value"),
        ({"validation_pairs": 0}, ValueError, "validation_pairs"),
    ],
)
def test_bad_input_is_named(data_dir, settings, error, message):
    with pytest.raises(error, match=message):
        arguments(data_dir, **settings)


@pytest.mark.parametrize("missing", ["train", "test"])
def test_a_task_without_both_folders_is_refused_before_anything_runs(tmp_path, missing):
    write_pairs(tmp_path / "a" / ("test" if missing == "train" else "train"), 3)
    args = arguments(tmp_path, tasks=["a"], resolution=32)
    with pytest.raises(FileNotFoundError, match=f"no folder .*a.{missing}"):
        run.check_data(args)


def test_colora_without_a_flag_alone_has_a_fixed_rate():
    rates = {Variant("a", 16, "prod", method).fixed_rate for method in ("colora", "full", "peft_lora", "lora")}
    default, plain = (Variant("a", 16, "prod", method) for method in ("colora_default", "colora_plain"))
    assert rates == {None} and default.fixed_rate == plain.fixed_rate == LEARNING_RATES["colora"]


@pytest.mark.parametrize(
    ("method", "weight"),
    [
        ("colora_default", FinetuneArguments.checkerboard_weight),
        ("peft_lora_checkerboard", FinetuneArguments.checkerboard_weight),
        ("lora", 0),
    ],
)
def test_a_cell_trains_on_the_loss_of_its_method(data_dir, tiny_nafnet, monkeypatch, method, weight):
    args = arguments(data_dir, networks=[f"prod={tiny_nafnet}"], train_pairs=[3], validation_pairs=2, resolution=32)
    seen = []
    monkeypatch.setattr(
        run, "train_and_validate", lambda _model, _patches, _pairs, flags, *_: seen.append(flags) or {}
    )
    run.run_cell(args, Variant("a", 3, "prod", method, 0.3), 1e-3, 0, Accelerator(cpu=True))
    assert [flags.checkerboard_weight for flags in seen] == [weight]


def test_colora_without_a_flag_and_the_methods_named_so_alone_have_the_loss_on_checkerboards():
    weights = {method: Variant("a", 16, "prod", method).checkerboard_weight for method in plan.WAYS}
    with_loss = {method for method, weight in weights.items() if weight == FinetuneArguments.checkerboard_weight > 0}
    assert with_loss == {"colora_default", "full_checkerboard", "peft_lora_checkerboard"}
    assert {weights[method] for method in weights.keys() - with_loss} == {0}


def test_a_network_that_is_not_shipped_is_refused_with_the_page_of_its_command(data_dir):
    with pytest.raises(FileNotFoundError, match="no network in outputs/x/nafnet-small-single-12k.*README.md"):
        arguments(data_dir, networks=["prod=x", "single=outputs/x/nafnet-small-single-12k"])


@pytest.mark.slow
def test_launched_benchmark_runs_every_cell_once(data_dir, tiny_nafnet, tmp_path):
    command = ["methods.run", "--data_dir", data_dir, "--tasks", "a", "b", "--networks", f"prod={tiny_nafnet}", "none",
               "--train_pairs", 3, "--tuned_at", 3, "--validation_pairs", 2, "--max_train_steps", 1,
               "--resolution", 32, "--per_device_train_batch_size", 1, "--seeds", 0, 1, "--learning_rates", "1e-3",
               "--full_learning_rates", "5e-4",
               "--budgets", 0.3,
               "--output_dir", tmp_path]  # fmt: skip
    done = launch(*command)
    assert done.returncode == 0, done.stderr
    cells = json.loads((tmp_path / "cells.json").read_text())
    # Tasks, ways and networks, seeds with the one to tune; and the way for which nothing is tuned.
    assert len(cells) == 2 * (6 + 1) * 3 + 2 * 2
    rates = {c["method"]: c["learning_rate"] for c in cells}
    own = {"full": 5e-4, "colora_default": LEARNING_RATES["colora"]}
    assert rates == dict.fromkeys(rates, 1e-3) | own and len(rates) == 7
    for task in ("a", "b"):  # switched off, an adapter leaves the network what it was, whatever was trained
        switched_off = [(task, method) for method in ("lora", "peft_lora", "colora")]
        kept = {c["psnr_old_task"] for c in cells if (c["task"], c["method"]) in switched_off and c["seed"] != 100}
        tuned = {c["psnr_old_task"] for c in cells if (c["task"], c["method"]) == (task, "full") and c["seed"] != 100}
        assert len(kept) == 1 and len(tuned) == 4 and not kept & tuned
    text = (tmp_path / "report.md").read_text()
    for row in (
        "none + full",
        "prod + bias",
        "prod + lora 0.3",
        "prod + peft_lora 0.3",
        "one rank for all, both with a budget of 0.3",
    ):
        assert row in text
    assert len(list((tmp_path / "pictures").glob("*.jpg"))) == 2 * (7 + 1)
    again = launch(*command, "--data_dir", tmp_path / "gone", "--report_only", "True")
    assert again.returncode == 0 and json.loads((tmp_path / "cells.json").read_text()) == cells
    changed = [*command, "--networks", f"prod={EXAMPLES / 'checkpoints' / 'nafnet-small-prod'}", "--tasks", "a",
               "--comparisons", "pretraining"]  # fmt: skip
    other = launch(*changed)
    assert other.returncode == 1 and "The network 'prod' was run with other weights before" in other.stderr
    other = launch(*command, "--max_train_steps", 2)
    assert other.returncode == 1 and "cells with max_train_steps 1, not 2" in other.stderr
    assert json.loads((tmp_path / "cells.json").read_text()) == cells
