"""Evaluation while a run trains: true figures, images, trackers, and no trace in the weights."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file
from support.loop import DiesAt, Killed, NoisyPatches, arguments, assert_equal, launch_two, nafnet, plain, rows

from colora_peft import CoLoRAConfig
from colora_peft.data.pairs import PairedImageFolder, PairSubset
from colora_peft.evaluation.evaluate import evaluate
from colora_peft.training.loop import train
from colora_peft.training.output_dir import check_output_dir, open_output_dir

LOG = "validation_log.jsonl"


class Recorder(GeneralTracker):
    """Keeps what it is sent."""

    name = "recorder"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.settings, self.rows, self.images, self.finished = None, [], [], 0

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step=None, **settings):
        self.rows.append((step, values))

    def log_images(self, values, step=None, **settings):
        self.images.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture
def pairs(eval_dir):
    return PairedImageFolder(eval_dir)


def run(folder, model, pairs, dataset=None, tracker=None, **settings):
    args = arguments(folder, **settings)
    accelerator = Accelerator(cpu=True, log_with=tracker)
    checkpoint = check_output_dir(args)
    with open_output_dir(args, accelerator, checkpoint):
        model, _ = train(model, dataset or NoisyPatches(), args, accelerator, checkpoint, pairs)
    return model


def adapted():
    torch.manual_seed(1)
    return get_peft_model(nafnet(), CoLoRAConfig(parameter_budget=0.3))


@pytest.mark.parametrize("make", [nafnet, plain, adapted])
@pytest.mark.parametrize("use_ema", [False, True])
def test_evaluating_leaves_the_run_bitwise_as_it_is(tmp_path, pairs, make, use_ema):
    expected = run(tmp_path / "without", make(), None, use_ema=use_ema).state_dict()
    found = run(tmp_path / "with", make(), pairs, use_ema=use_ema, validation_steps=2).state_dict()
    assert_equal(found, expected)


@pytest.mark.parametrize("make", [nafnet, adapted])
@pytest.mark.parametrize("use_ema", [False, True])
def test_figures_are_those_of_the_weights_that_would_be_the_result(tmp_path, pairs, make, use_ema):
    flags = {"use_ema": use_ema, "ema_decay": 0.5, "checkpointing_steps": 4, "checkpoints_total_limit": 0}
    result = run(tmp_path, make(), pairs, validation_steps=4, **flags)
    four, six = rows(tmp_path, LOG)
    assert (four["step"], six["step"]) == (4, 6)
    model = make()
    model.load_state_dict(load_file(tmp_path / "checkpoint-4" / f"{'ema' if use_ema else 'model'}.safetensors"), False)
    for row, network in ((four, model), (six, result)):
        expected = evaluate(network, pairs, torch.device("cpu"), "")
        assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert four["psnr"] != six["psnr"]


def test_images_and_figures_reach_folder_and_trackers(tmp_path, pairs):
    recorder = Recorder()
    run(tmp_path, nafnet(), pairs, tracker=recorder, validation_steps=3, gradient_accumulation_steps=2)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step-3.png", "step-6.png"]
    for step, images in recorder.images:
        with Image.open(tmp_path / "samples" / f"step-{step}.png") as image:
            assert np.array_equal(images["validation/samples"], np.asarray(image.convert("RGB"))[None])
    validated = [(step, values) for step, values in recorder.rows if "validation/psnr" in values]
    logged = rows(tmp_path, LOG)
    assert [step for step, _ in validated] == [step for step, _ in recorder.images] == [3, 6]
    assert [values["validation/ssim"] for _, values in validated] == [row["ssim"] for row in logged]
    (trained,) = [(step, values) for step, values in recorder.rows if "loss" in values]
    (row,) = rows(tmp_path)
    assert trained == (6, {name: row[name] for name in ("loss", "psnr", "learning_rate", "patches_per_second")})
    assert 0 < row["patches_per_second"] and row["patches_per_second"] * row["seconds"] > 6 * 4
    assert recorder.settings["gradient_accumulation_steps"] == 2 and recorder.finished == 1


def test_tracker_is_finished_when_the_run_fails(tmp_path):
    recorder = Recorder()
    with pytest.raises(Killed):
        run(tmp_path, nafnet(), None, DiesAt(3), tracker=recorder)
    assert recorder.finished == 1


def test_no_evaluation_is_missing_or_twice_after_a_resume(tmp_path, pairs):
    flags = {"validation_steps": 1, "checkpointing_steps": 3}
    run(tmp_path / "whole", nafnet(), pairs, **flags)
    with pytest.raises(Killed):
        run(tmp_path / "parts", nafnet(), pairs, DiesAt(10), **flags)
    assert [row["step"] for row in rows(tmp_path / "parts", LOG)] == [1, 2, 3, 4, 5]
    run(tmp_path / "parts", nafnet(), pairs, resume_from_checkpoint="latest", **flags)
    assert rows(tmp_path / "parts", LOG) == rows(tmp_path / "whole", LOG)


def test_evaluation_without_images_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="--validation_steps needs images"):
        run(tmp_path, nafnet(), None, validation_steps=2)
    assert not any(path.name.startswith(("checkpoint", "samples", LOG)) for path in tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])  # fewer pairs than processes, and as many
def test_processes_share_the_pairs_out(tmp_path, eval_dir, pairs, count):
    flags = {"max_train_steps": 4, "validation_steps": 2}
    launch_two(tmp_path, tmp_path / "two", eval_dir=str(eval_dir), eval_count=count, **flags)
    run(tmp_path / "one", nafnet(), PairSubset(pairs, range(count)), **flags)
    for one, two in zip(rows(tmp_path / "one", LOG), rows(tmp_path / "two", LOG), strict=True):
        assert two == pytest.approx(one, abs=1e-3)
