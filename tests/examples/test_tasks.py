"""examples/tasks.py: trains what is missing and nothing else, and its tables say what is."""

import io
import json
import re
from contextlib import redirect_stdout

import pytest
import torch
from PIL import Image
from support.adapters import adapter_set
from support.examples import EXAMPLES, load_example, write_pairs

from colora_peft.data.pairs import PairedImageFolder
from colora_peft.evaluation.evaluate import evaluate

tasks = load_example("tasks")


@pytest.fixture(scope="module", autouse=True)
def few_and_small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "SWITCHES", 6)
        patch.setattr(tasks, "IMAGE_PX", 32)
        patch.setattr("finetune.use_all_cores", lambda _: None)  # would be for all tests after these, too
        yield


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for count, task in enumerate(("haze", "rain"), start=2):
        write_pairs(folder / task / "train", count, size=32)
        write_pairs(folder / task / "test", count + 2, size=32)
    (folder / "notes").mkdir()
    return folder


@pytest.fixture(scope="module")
def trained(data_dir, tiny_nafnet, tmp_path_factory):
    """The arguments of a run, what it printed, and what it had written."""
    output_dir = tmp_path_factory.mktemp("out") / "tasks"
    arguments = {
        "data_dir": str(data_dir),
        "model_name_or_path": str(tiny_nafnet),
        "output_dir": str(output_dir),
        "max_train_steps": 3,
        "resolution": 32,
    }
    printed = io.StringIO()
    with redirect_stdout(printed):
        tasks.main(tasks.TasksArguments(**arguments))
    return arguments, printed.getvalue(), output_dir


def rows_of(text, first):
    """The cells of the Markdown row that begins so."""
    return next(line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(f"| {first} |"))


def test_the_report_says_what_was_measured(trained, data_dir):
    arguments, printed, output_dir = trained
    report = (output_dir / "tasks.md").read_text()
    assert report.strip() in printed
    for task, pairs in (("haze", "2 / 4"), ("rain", "3 / 5")):
        metrics = json.loads((output_dir / task / "metrics.json").read_text())
        row = rows_of(report, task)
        assert row[:2] == [task, pairs]
        assert row[2:5] == [f"{metrics[f'psnr_{when}']:.2f}" for when in ("input", "before", "after")]
    switch_ms = float(re.search(r"A switch takes ([\d.]+) ms", report)[1])
    assert 0 < switch_ms < 1000

    # The second table, measured by other means.
    table = report[report.index("| adapter |") :]
    loaded = adapter_set(arguments["model_name_or_path"], tasks.adapters_in(output_dir))
    loaded.blend(["haze", "rain"], [0.5, 0.5], "blend")
    for name in ("none", "haze", "rain", "blend"):
        for column, task in enumerate(("haze", "rain"), start=1):
            pairs = PairedImageFolder(data_dir / task / "test")
            psnr = evaluate(loaded.activate(name), pairs, torch.device("cpu"), "")["psnr"]
            assert float(rows_of(table, name)[column]) == pytest.approx(psnr, abs=0.006)


def test_what_is_trained_is_kept_and_other_settings_are_pointed_out(trained, capsys, monkeypatch):
    arguments, _, output_dir = trained
    monkeypatch.setattr(tasks, "finetune", lambda _: pytest.fail("trained again"))
    tasks.train_missing(tasks.TasksArguments(**arguments))
    assert capsys.readouterr().out == "".join(f"{task}: kept, in {output_dir / task}.\n" for task in ("haze", "rain"))
    tasks.train_missing(tasks.TasksArguments(**{**arguments, "max_train_steps": 4}))
    assert "haze: kept" in (said := capsys.readouterr().out) and "--max_train_steps 3 (now 4)" in said
    tasks.train_missing(tasks.TasksArguments(**{**arguments, "checkerboard_weight": 0.0}))
    assert "--checkerboard_weight 5.0 (now 0.0)" in capsys.readouterr().out


def test_a_task_that_was_stopped_goes_on_from_its_checkpoint(trained, tmp_path, monkeypatch):
    arguments = tasks.TasksArguments(**{**trained[0], "tasks": ["haze"]})
    (trained[2] / "haze" / "metrics.json").rename(tmp_path / "metrics.json")
    begun = []
    monkeypatch.setattr(tasks, "finetune", begun.append)
    tasks.train_missing(arguments)
    (tmp_path / "metrics.json").rename(trained[2] / "haze" / "metrics.json")
    assert [run.resume_from_checkpoint for run in begun] == ["latest"]
    fresh = tasks.TasksArguments(**{**trained[0], "output_dir": str(tmp_path / "fresh")})
    assert fresh.finetune_arguments("haze").resume_from_checkpoint is None


def test_a_blend_is_measured_on_as_many_pairs_as_asked_for(trained):
    for asked_for, count in ((None, 4), (3, 3), (9, 4)):
        args = tasks.TasksArguments(**{**trained[0], "blend_samples": asked_for})
        assert len(tasks.test_pairs(args, "haze")) == count


def test_without_data_the_adapters_that_are_there_are_listed(trained, capsys):
    arguments, _, output_dir = trained
    args = tasks.TasksArguments(model_name_or_path=arguments["model_name_or_path"], output_dir=str(output_dir))
    assert args.tasks == ["haze", "rain"]
    tasks.main(args)
    printed = capsys.readouterr().out
    assert rows_of(printed, "rain")[1] == "3 / 5" and "A switch takes" in printed and "| adapter |" not in printed


def test_the_shipped_adapters_are_listed_by_default():
    assert tasks.TasksArguments().tasks == sorted(path.name for path in tasks.SHIPPED.iterdir() if path.is_dir())


def test_the_image_shows_the_examples_of_the_adapters_that_are_there(tiny_nafnet, trained, tmp_path):
    tasks.draw_examples(adapter_set(tiny_nafnet, {"rain": trained[2] / "rain"}), str(tmp_path / "rain.jpg"))
    width, height = Image.open(tmp_path / "rain.jpg").size
    assert width > 2 * height  # three images in one row


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"data_dir": "nowhere"}, "no folder nowhere"),
        ({"tasks": ["haze", "haze"]}, "name each once"),
        ({"blend": ["haze", "snow"]}, "name two of --tasks"),
        ({"blend": ["haze"]}, "name two of --tasks"),
        ({"blend_weights": [1.0]}, "give two numbers"),
        ({"blend_samples": 0}, "must be at least 1"),
        ({"max_train_steps": 0}, "must be at least 1"),
    ],
)
def test_wrong_flags_are_refused(data_dir, wrong, message):
    with pytest.raises((ValueError, OSError), match=message):
        tasks.TasksArguments(**{"data_dir": str(data_dir), **wrong})


def test_pairs_of_all_tasks_are_looked_at_before_the_first_is_trained(data_dir, tiny_nafnet, tmp_path):
    arguments = {
        "data_dir": str(data_dir),
        "model_name_or_path": str(tiny_nafnet),
        "output_dir": str(tmp_path / "out"),
    }
    with pytest.raises(FileNotFoundError, match="snow"):
        tasks.train_missing(tasks.TasksArguments(tasks=["haze", "snow"], **arguments))
    assert not (tmp_path / "out").exists()


def test_a_task_that_is_stopped_is_told_what_this_script_knows(data_dir):
    run = tasks.TasksArguments(data_dir=str(data_dir)).finetune_arguments("haze")
    assert (
        run.way_to_go_on == "the same command" and "--resume_from_checkpoint" in tasks.FinetuneArguments.way_to_go_on
    )


def test_a_folder_without_tasks_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds train/ and test/"):
        tasks.tasks_in(tmp_path)


def test_example_photos_are_ones_that_no_training_pair_shows():
    for task, names in tasks.EXAMPLES.items():
        train, test = (EXAMPLES / "data" / task / side / "input" for side in ("train", "test"))
        trained_on = {path.stem for path in train.iterdir()} if train.is_dir() else set()
        assert all((test / f"{name}.jpg").is_file() and name not in trained_on for name in names)
