"""`--report_to`: the trackers of Accelerate, or one sentence where the package is missing."""

import importlib.util

import pytest
from PIL import Image
from test_training import NoisyPatches, arguments, nafnet, rows

from colora_peft.pairs import PairedImageFolder
from colora_peft.run_folder import check_output_dir, create_output_dir
from colora_peft.trackers import create_accelerator
from colora_peft.training import train


@pytest.mark.parametrize("package", ["tensorboard", "wandb", "trackio"])
def test_missing_package_is_named_and_nothing_is_written(tmp_path, monkeypatch, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"--report_to {package} needs .*pip install {package}"):
        create_accelerator(arguments(tmp_path / "out", report_to=package))
    assert not (tmp_path / "out").exists()


def test_none_has_no_tracker(tmp_path):
    accelerator = create_accelerator(arguments(tmp_path))
    assert accelerator.log_with == [] and accelerator.trackers == []


def test_tensorboard_holds_figures_and_pictures(tmp_path, eval_dir):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = arguments(tmp_path / "out", report_to="tensorboard", validation_steps=3)
    accelerator = create_accelerator(args)
    assert check_output_dir(args) is None and not (tmp_path / "out").exists()
    create_output_dir(args, accelerator)
    train(nafnet(), NoisyPatches(), args, accelerator, None, PairedImageFolder(eval_dir))
    events = EventAccumulator(str(tmp_path / "out" / "logs" / "colora-peft")).Reload()
    (row,) = rows(tmp_path / "out")
    for name in ("loss", "psnr", "learning_rate", "patches_per_second"):
        (event,) = events.Scalars(name)
        assert event.step == 6 and event.value == pytest.approx(row[name], rel=1e-6)
    assert [event.step for event in events.Scalars("validation/psnr")] == [3, 6]
    pictures = events.Images("validation/samples")
    for event in pictures:
        with Image.open(tmp_path / "out" / "samples" / f"step-{event.step}.png") as picture:
            assert (event.width, event.height) == picture.size
    assert [event.step for event in pictures] == [3, 6]
