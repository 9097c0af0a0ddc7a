"""--save_best: the result of the step with the best validation, kept beside the last one."""

import errno
import json
import os
import shutil

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from safetensors.torch import load_file
from support.loop import DiesAt, Killed, NoisyPatches, arguments, assert_equal, launch_two, nafnet, plain, rows

from colora_peft import CoLoRAConfig
from colora_peft.data.pairs import PairedImageFolder, PairSubset
from colora_peft.evaluation import evaluate
from colora_peft.hub import load_backbone
from colora_peft.training import best as module
from colora_peft.training.best import BestStep, read_best
from colora_peft.training.loop import train
from colora_peft.training.output_dir import check_output_dir, open_output_dir

LOG = "validation_log.jsonl"
EACH_STEP = {"validation_steps": 1, "save_best": True, "checkpointing_steps": 3}


@pytest.fixture
def pairs(eval_dir):
    return PairedImageFolder(eval_dir)


def run(folder, pairs, dataset=None, make=nafnet, **settings):
    args, accelerator = arguments(folder, **(EACH_STEP | settings)), Accelerator(cpu=True)
    checkpoint = check_output_dir(args)
    with open_output_dir(args, accelerator, checkpoint):
        return train(make(), dataset or NoisyPatches(), args, accelerator, checkpoint, pairs)[0]


def figures(psnr, psnr_input=15.0):
    return {"psnr": psnr, "ssim": 0.5, "psnr_input": psnr_input, "ssim_input": 0.4}


def kept(folder):
    return load_file(folder / "best" / "model.safetensors")


@pytest.mark.parametrize("use_ema", [False, True])
def test_the_weights_kept_are_those_of_the_step_with_the_best_figures(tmp_path, pairs, use_ema):
    run(tmp_path, pairs, use_ema=use_ema, ema_decay=0.5, learning_rate=0.05, max_train_steps=8)
    logged = rows(tmp_path, LOG)
    best = max(logged, key=lambda row: row["psnr"])
    assert best["step"] < 8  # so that it is not the last one
    assert json.loads((tmp_path / "best" / "metrics.json").read_text()) == best
    measured = evaluate(load_backbone(str(tmp_path / "best")), pairs, torch.device("cpu"), "")
    assert measured["psnr"] == pytest.approx(best["psnr"], abs=1e-4)
    assert (tmp_path / "best" / "preprocessor_config.json").is_file()


def test_keeping_leaves_the_run_bitwise_as_it_is(tmp_path, pairs):
    expected = run(tmp_path / "without", pairs, save_best=False).state_dict()
    assert_equal(run(tmp_path / "with", pairs).state_dict(), expected)
    assert not (tmp_path / "without" / "best").exists()


def test_of_a_killed_and_resumed_run_it_is_that_of_the_whole_one(tmp_path, pairs):
    flags = {"learning_rate": 0.05, "max_train_steps": 8}
    run(tmp_path / "whole", pairs, **flags)
    for killed_in_step in (2, 5, 7):  # the first time, there is no checkpoint yet
        with pytest.raises(Killed):
            run(tmp_path / "parts", pairs, DiesAt(2 * killed_in_step), resume_from_checkpoint="latest", **flags)
    run(tmp_path / "parts", pairs, resume_from_checkpoint="latest", **flags)
    assert read_best(tmp_path / "parts") == read_best(tmp_path / "whole")
    assert_equal(kept(tmp_path / "parts"), kept(tmp_path / "whole"))


def test_the_best_of_before_stays_until_a_later_step_is_better(tmp_path):
    for step, psnr, expected in ((1, 20.0, 1), (2, 19.0, 1), (3, float("nan"), 1), (4, 20.0, 1), (5, 21.0, 5)):
        keeper = BestStep(tmp_path, Accelerator(cpu=True))  # anew each time, as by a run that goes on
        assert keeper.keep(nafnet(), figures(psnr), step) is None
        assert read_best(tmp_path)["step"] == expected


def test_figures_of_other_images_are_not_compared(tmp_path):
    keeper = BestStep(tmp_path, Accelerator(cpu=True))
    keeper.keep(nafnet(), figures(20.0), 1)
    note = keeper.keep(nafnet(), figures(12.0, psnr_input=11.0), 2)
    assert note == "The best step so far, 1, was found on other images and is replaced by 2."
    assert read_best(tmp_path)["psnr"] == 12.0


def test_an_adapter_is_kept_as_an_adapter(tmp_path):
    BestStep(tmp_path, Accelerator(cpu=True)).keep(get_peft_model(nafnet(), CoLoRAConfig(ranks=2)), figures(20.0), 1)
    assert {path.name for path in (tmp_path / "best").iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "metrics.json", "preprocessor_config.json"}  # fmt: skip


def test_a_full_disk_leaves_the_best_of_before_whole(tmp_path, monkeypatch):
    keeper = BestStep(tmp_path, Accelerator(cpu=True))
    keeper.keep(nafnet(), figures(20.0), 1)
    before = kept(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        keeper.keep(brighter(), figures(21.0), 2)
    assert_equal(kept(tmp_path), before)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def brighter():
    model = nafnet()
    with torch.no_grad():
        model.intro.weight += 1
    return model


def test_a_best_step_without_its_checkpoints_is_not_deleted_unasked(tmp_path, pairs):
    run(tmp_path, pairs)
    for path in tmp_path.glob("checkpoint-*"):
        shutil.rmtree(path)
    (tmp_path / "best" / "metrics.json").write_text(json.dumps({"step": 5, **figures(20.0)}))
    with pytest.raises(ValueError, match="holds files but no checkpoint"):
        run(tmp_path, pairs, resume_from_checkpoint="latest")


def test_damaged_figures_are_named(tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "metrics.json").write_text('{"step": 3')
    with pytest.raises(ValueError, match="metrics.json is damaged .* delete .*best"):
        BestStep(tmp_path, Accelerator(cpu=True))


def test_a_network_that_cannot_be_saved_is_refused_at_once(tmp_path, pairs):
    with pytest.raises(ValueError, match="--save_best needs a network with save_pretrained, which Sequential has not"):
        run(tmp_path, pairs, make=plain)


def test_it_needs_validations(tmp_path):
    with pytest.raises(ValueError, match="--save_best has no effect without --validation_steps: add it"):
        arguments(tmp_path, save_best=True)


@pytest.mark.slow
def test_of_two_processes_one_writes(tmp_path, eval_dir, pairs):
    flags = {"max_train_steps": 4, "validation_steps": 2, "save_best": True}
    launch_two(tmp_path, tmp_path / "two", eval_dir=str(eval_dir), eval_count=2, **flags)
    run(tmp_path / "one", PairSubset(pairs, range(2)), **flags)
    one, two = read_best(tmp_path / "one"), read_best(tmp_path / "two")
    assert one == pytest.approx(two, abs=1e-3)
    for name, tensor in kept(tmp_path / "two").items():
        torch.testing.assert_close(tensor, kept(tmp_path / "one")[name], rtol=0, atol=1e-5)
