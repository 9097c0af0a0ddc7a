"""examples/pretrain.py, launched and in one process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import EXAMPLES, load_example
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageToImage, HfArgumentParser

pretrain = load_example("pretrain")

QUICK = ["--max_train_steps", "4", "--per_device_train_batch_size", "2", "--resolution", "32"]


def run(*flags: object) -> Path:
    (args,) = HfArgumentParser(pretrain.PretrainArguments).parse_args_into_dataclasses([str(flag) for flag in flags])
    pretrain.main(args)
    return Path(args.output_dir)


@pytest.fixture
def flags(train_dir, tiny_nafnet, tmp_path):
    folders = ["--train_dir", train_dir / "input", "--config_name", tiny_nafnet, "--output_dir", tmp_path / "out"]
    return [*folders, *QUICK]


def test_launched_run_gives_a_loadable_network_with_a_card(flags, tmp_path):
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        str(EXAMPLES / "pretrain.py"),
        *map(str, flags),
        "--half_precision_weights",
    ]
    done = subprocess.run([*command, "--data_card", "noise of a test"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    output_dir = tmp_path / "out"
    model = AutoModelForImageToImage.from_pretrained(output_dir)
    assert model.dtype == torch.float32
    stored = load_file(output_dir / "model.safetensors")
    trained = load_file(output_dir / "checkpoint-4" / "model.safetensors")
    assert all(tensor.dtype == torch.float16 for tensor in stored.values())
    assert all(torch.equal(trained[name].half(), tensor) for name, tensor in stored.items())
    card = (output_dir / "README.md").read_text()
    assert "noise of a test" in card and "mode `prod`" in card and "4 steps of 2 patches of 32x32" in card


def test_modes_differ_and_a_seed_repeats_itself(flags, tmp_path):
    weights = {}
    for name, extra in {
        "prod": [],
        "again": [],
        "single": ["--mode", "single"],
        "fixed": ["--mode", "fixed"],
        "workers": ["--dataloader_num_workers", 2],
    }.items():
        output_dir = run(*flags, *extra, "--output_dir", tmp_path / name)
        weights[name] = load_file(output_dir / "model.safetensors")["ending.weight"]
    assert torch.equal(weights["prod"], weights["again"])
    assert torch.equal(weights["prod"], weights["workers"])
    assert len({tuple(weights[mode].flatten().tolist()) for mode in ("prod", "single", "fixed")}) == 3


def test_given_weights_are_the_start(flags, tiny_nafnet, tmp_path):
    """With a vanishing learning rate the result is the network it began with."""
    output_dir = run(*flags, "--model_name_or_path", tiny_nafnet, "--learning_rate", 1e-12)
    begun = load_file(tiny_nafnet / "model.safetensors")
    ended = load_file(output_dir / "model.safetensors")
    assert all(torch.allclose(ended[name], tensor, atol=1e-6) for name, tensor in begun.items())


def test_the_run_is_logged(flags):
    output_dir = run(*flags)
    rows = [json.loads(line) for line in (output_dir / "train_log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 4 and {"loss", "psnr", "learning_rate", "seconds"} <= rows[-1].keys()


def test_evaluated_at_intervals_averaged_and_accumulated(flags, eval_dir):
    extra = ["--eval_dir", eval_dir / "target", "--validation_steps", 2, "--use_ema"]
    output_dir = run(*flags, *extra, "--gradient_accumulation_steps", 2, "--per_device_train_batch_size", 1)
    rows = [json.loads(line) for line in (output_dir / "validation_log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    assert rows[0]["psnr_input"] == rows[1]["psnr_input"] and rows[0]["psnr"] != rows[1]["psnr"]
    assert {path.name for path in (output_dir / "samples").iterdir()} == {"step-2.png", "step-4.png"}
    result, averages, weights = (
        load_file(output_dir / name)
        for name in ("model.safetensors", "checkpoint-4/ema.safetensors", "checkpoint-4/model.safetensors")
    )
    assert all(torch.equal(result[name], tensor) for name, tensor in averages.items())
    assert any(not torch.equal(result[name], tensor) for name, tensor in weights.items())
    card = (output_dir / "README.md").read_text()
    assert "4 steps of 2 patches of 32x32" in card and "weights averaged with decay 0.9999" in card


@pytest.mark.parametrize(
    ("extra", "culprit"),
    [
        (["--validation_steps", 2], "--validation_steps and --eval_dir need each other"),
        (["--eval_dir", "anywhere"], "--validation_steps and --eval_dir need each other"),
        (["--eval_dir", "anywhere", "--validation_steps", 2, "--resolution", 8], "--resolution must be at least 11"),
        (["--eval_dir", "nowhere", "--validation_steps", 2], "nowhere"),
    ],
)
def test_evaluation_that_cannot_be_is_refused_before_anything_is_written(flags, tmp_path, extra, culprit):
    with pytest.raises((ValueError, FileNotFoundError), match=culprit):
        run(*flags, *extra)
    assert not (tmp_path / "out").exists()


def too_small(path: Path) -> None:
    Image.new("RGB", (20, 60)).save(path)


def no_picture(path: Path) -> None:
    path.write_bytes(b"no picture")


def truncated(path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:600])


@pytest.mark.parametrize(
    ("spoil", "culprit"), [(too_small, "bad.jpg.*20x60"), (no_picture, "bad.jpg"), (truncated, "bad.jpg")]
)
def test_bad_pictures_are_named_and_nothing_is_left_behind(flags, tmp_path, spoil, culprit):
    folder = tmp_path / "clean"
    folder.mkdir()
    spoil(folder / "bad.jpg")
    with pytest.raises(ValueError, match=culprit):
        run(*flags, "--train_dir", folder)
    assert not (tmp_path / "out").exists()


def test_a_missing_train_dir_is_asked_for(tmp_path):
    with pytest.raises(ValueError, match="--train_dir"):
        run("--output_dir", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run("--train_dir", tmp_path / "nowhere", "--output_dir", tmp_path / "out")
