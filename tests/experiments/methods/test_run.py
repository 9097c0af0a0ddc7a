"""The comparison of methods: its plan, its report, then the script launched."""

import json

import pytest
from support.examples import EXAMPLES, write_pairs
from support.experiments import launch

from colora_peft.training import LEARNING_RATES
from examples.experiments.methods import plan, rates, report, run
from examples.experiments.methods.plan import Variant


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


def cell(seed, psnr, network="prod", method="full", **settings):
    return {"task": "a", "train_pairs": 16, "network": network, "method": method, "learning_rate": 1e-3, "seed": seed,
            "psnr": psnr, "psnr_input": 10.0, "ssim": psnr / 100, "ssim_input": 0.1, "seconds": 2.0,
            "trainable_parameters": 7, "trainable_ratio": 0.5, "hardware": "a laptop", **settings}  # fmt: skip


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
    assert "- a, 16 pairs, none + full, 0.008, seed 0: infinite" in text


def test_what_runs_without_a_flag_is_not_tuned_and_is_compared_at_its_own_rate(tmp_path):
    def default(seed, psnr, budget):
        return cell(seed, psnr, method="colora_default", parameter_budget=budget, learning_rate=5e-3)

    cells = [default(seed, 20.5 + seed, 0.07) for seed in (0, 1)] + [
        default(seed, 20.4 + seed, 0.02) for seed in (0, 1)
    ]
    cells += [cell(seed, 20.0 + seed, method="peft_lora", parameter_budget=0.07) for seed in (0, 1)]
    write_cells(tmp_path, cells)
    text = report.write_report(tmp_path)
    assert "| CoLoRA 0.07 at finetune.py's rate minus PEFT's LoRA | +0.50 ± 0.00 (2) |" in text
    assert "| CoLoRA at finetune.py's rate, 0.02 minus 0.07 | -0.10 ± 0.00 (2) |" in text
    assert "| prod + colora_default 0.07 | 21.00 ± 0.71 (2) at 0.005 |" in text
    assert "CoLoRA with nothing tuned" not in text, "there is no full tuning beside it"
    write_cells(tmp_path, [*cells, *(cell(seed, 19.0 + seed) for seed in (0, 1))])
    assert "| a | 10.00 | 19.50 | 20.50 | 21.00 | +0.50 ± 0.00 (2) |" in report.write_report(tmp_path)
    write_cells(tmp_path, [*cells, cell(0, 19.0)])
    assert "CoLoRA with nothing tuned" not in report.write_report(tmp_path), "full tuning has one draw of two"
    rates = {Variant("a", 16, "prod", method).fixed_rate for method in ("colora", "full", "peft_lora", "lora")}
    assert rates == {None} and Variant("a", 16, "prod", "colora_default").fixed_rate == LEARNING_RATES["colora"]


def test_a_report_of_failures_alone_names_them(tmp_path):
    write_cells(tmp_path, [FAILED])
    assert "none + full, 0.008, seed 0: infinite" in report.write_report(tmp_path)


def test_there_is_a_mean_only_of_the_same_draws(tmp_path):
    cells = [cell(seed, 10.0 * seed) for seed in (1, 2, 3)] + [cell(3, 29.0, method="bias")]
    write_cells(tmp_path, cells)
    text = report.write_report(tmp_path)
    assert "| prod + full | 20.00 ± 10.00 (3) at 0.001 | 20.00 |" in text
    assert "| prod + bias | 29.00 (1) at 0.001 |  |" in text


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


def test_a_network_that_is_not_shipped_is_refused_with_the_page_of_its_command(data_dir):
    with pytest.raises(FileNotFoundError, match="no network in outputs/x/nafnet-small-single-12k.*README.md"):
        arguments(data_dir, networks=["prod=x", "single=outputs/x/nafnet-small-single-12k"])


def test_the_table_of_learning_rates_marks_the_best_and_says_what_failed():
    tried = [{**cell(100, psnr), "learning_rate": rate} for rate, psnr in ((1e-3, 20.0), (2e-3, 21.0))]
    failed = {name: value for name, value in tried[0].items() if name != "psnr"}
    line = rates.rates_table([*tried, {**failed, "learning_rate": 4e-3}]).splitlines()[2]
    assert line == "| a, 16 pairs, prod + full | 20.00 | **21.00** | failed |"


def tuned_at(task, psnr):
    return [cell(100, value, task=task, learning_rate=rate) for rate, value in psnr.items()]


def test_one_rate_for_all_tasks_is_weighed_against_the_best_of_each():
    cells = [*tuned_at("a", {1e-3: 20.0, 2e-3: 19.0}), *tuned_at("b", {1e-3: 30.0, 2e-3: 29.0, 4e-3: 50.0})]
    assert rates.one_rate_table(cells) == "", "two tasks are too few to choose on the others"
    cells += tuned_at("c", {1e-3: 37.0, 2e-3: 40.0})
    table = rates.one_rate_table(cells)
    # a and b lose 1 at 2e-3, c loses 3 at 1e-3; without c the others choose 1e-3, without a or b they choose 2e-3
    assert "| prod + full (3 tasks) | -1.00 | **-0.67** |  | -1.67 |" in table, "4e-3 was tried on one task alone"
    assert rates.one_rate_table([{**own, "psnr": own["psnr"] + 5.0} for own in cells]) == table


@pytest.mark.slow
def test_launched_benchmark_runs_every_cell_once(data_dir, tiny_nafnet, tmp_path):
    command = ["methods.run", "--data_dir", data_dir, "--tasks", "a", "b", "--networks", f"prod={tiny_nafnet}", "none",
               "--train_pairs", 3, "--tuned_at", 3, "--validation_pairs", 2, "--max_train_steps", 1,
               "--resolution", 32, "--per_device_train_batch_size", 1, "--seeds", 0, 1, "--learning_rates", "1e-3",
               "--budgets", 0.3,
               "--output_dir", tmp_path]  # fmt: skip
    done = launch(*command)
    assert done.returncode == 0, done.stderr
    cells = json.loads((tmp_path / "cells.json").read_text())
    # Tasks, ways and networks, seeds with the one to tune; and the way for which nothing is tuned.
    assert len(cells) == 2 * (6 + 1) * 3 + 2 * 2
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
