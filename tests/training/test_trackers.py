"""`--report_to`: the trackers of Accelerate, or one sentence where the package is missing."""

import importlib.util
import json

import pytest
from PIL import Image
from support.loop import DiesAt, Killed, NoisyPatches, arguments, nafnet, rows

from colora_peft.data.pairs import PairedImageFolder
from colora_peft.training.loop import train
from colora_peft.training.output_dir import check_output_dir, open_output_dir
from colora_peft.training.trackers import create_accelerator, running_trackers


@pytest.mark.parametrize("package", ["tensorboard", "wandb", "trackio"])
def test_missing_package_is_named_and_nothing_is_written(tmp_path, monkeypatch, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"--report_to {package} needs .*pip install {package}"):
        create_accelerator(arguments(tmp_path / "out", report_to=package))
    assert not (tmp_path / "out").exists()


def test_none_has_no_tracker(tmp_path):
    accelerator = create_accelerator(arguments(tmp_path))
    assert accelerator.log_with == [] and accelerator.trackers == []


def test_tensorboard_holds_figures_and_images(tmp_path, eval_dir):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = arguments(tmp_path / "out", report_to="tensorboard", validation_steps=3)
    accelerator = create_accelerator(args)
    assert check_output_dir(args) is None and not (tmp_path / "out").exists()
    with open_output_dir(args, accelerator, None):
        train(nafnet(), NoisyPatches(), args, accelerator, None, PairedImageFolder(eval_dir))
    events = EventAccumulator(str(tmp_path / "out" / "logs" / "colora-peft")).Reload()
    (row,) = rows(tmp_path / "out")
    for name in ("loss", "psnr", "learning_rate", "patches_per_second"):
        (event,) = events.Scalars(name)
        assert event.step == 6 and event.value == pytest.approx(row[name], rel=1e-6)
    assert [event.step for event in events.Scalars("validation/psnr")] == [3, 6]
    images = events.Images("validation/samples")
    for event in images:
        with Image.open(tmp_path / "out" / "samples" / f"step-{event.step}.png") as image:
            assert (event.width, event.height) == image.size
    assert [event.step for event in images] == [3, 6]


def start(folder, dataset, eval_dir, **flags):
    args = arguments(folder, **flags)
    accelerator = create_accelerator(args)
    checkpoint = check_output_dir(args)
    with open_output_dir(args, accelerator, checkpoint):
        train(nafnet(), dataset, args, accelerator, checkpoint, PairedImageFolder(eval_dir))


def test_a_resumed_run_is_one_run_without_repeated_steps(tmp_path, eval_dir):
    """Killed in step 6, after the evaluation of step 4 was sent, and resumed from step 3."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = {"report_to": "tensorboard", "validation_steps": 2, "checkpointing_steps": 3}
    with pytest.raises(Killed):
        start(tmp_path / "out", DiesAt(2 * 5), eval_dir, **flags)
    logs = tmp_path / "out" / "logs" / "colora-peft"
    begun = {path.name for path in logs.iterdir() if path.is_dir()}
    run = json.loads((tmp_path / "out" / "trackers.json").read_text())["tensorboard"]
    assert run["sent"] == {"validation": 4, "validation/samples": 4} and run["run"].startswith("out-")
    start(tmp_path / "out", NoisyPatches(), eval_dir, resume_from_checkpoint="latest", **flags)
    events = EventAccumulator(str(logs)).Reload()
    assert [event.step for event in events.Scalars("validation/psnr")] == [2, 4, 6]
    assert [event.step for event in events.Images("validation/samples")] == [2, 4, 6]
    assert [event.step for event in events.Scalars("loss")] == [6]
    assert {path.name for path in logs.iterdir() if path.is_dir()} == begun  # no other run of hyper-parameters
    resumed = json.loads((tmp_path / "out" / "trackers.json").read_text())["tensorboard"]
    assert resumed["run"] == run["run"] and resumed["sent"]["training"] == 6


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_the_run_of_a_service_is_found_again(tmp_path, monkeypatch, kind):
    """The service is asked for a new name first, then to go on with that name."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda log_with, *_: [log_with])
    asked = []
    for folder, settings in (("one", {}), ("one", {"resume_from_checkpoint": "latest"}), ("two/one", {})):
        args = arguments(tmp_path / folder, report_to=kind, **settings)
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        accelerator = create_accelerator(args)
        monkeypatch.setattr(accelerator, "init_trackers", lambda *call: asked.append(call))
        with running_trackers(accelerator, args):
            pass
    (_, settings, first), (_, none, resumed), (_, _, other) = asked
    assert settings["max_train_steps"] == 6 and none is None
    assert first[kind]["resume"] == "never" and resumed[kind] == {**first[kind], "resume": "allow"}
    assert first[kind]["name"].startswith("one-") and other[kind]["name"] != first[kind]["name"]
    if kind == "wandb":
        assert first[kind]["id"] == first[kind]["name"]
