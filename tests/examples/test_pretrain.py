"""examples/pretrain.py, launched and in one process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.examples import EXAMPLES, load_example
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageToImage, HfArgumentParser

from colora_peft.images.listing import list_images
from colora_peft.models import RestorationImageProcessor
from colora_peft.training import TrainingDiverged

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
    assert isinstance(AutoImageProcessor.from_pretrained(output_dir), RestorationImageProcessor)
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


def test_a_network_that_cannot_restore_is_refused_before_anything_is_written(flags, tiny_nafnet, tmp_path):
    grey = tmp_path / "grey"
    AutoModelForImageToImage.from_config(AutoConfig.from_pretrained(tiny_nafnet, num_channels=1)).save_pretrained(grey)
    broken = tmp_path / "broken"
    model = AutoModelForImageToImage.from_pretrained(tiny_nafnet)
    next(model.parameters()).data.fill_(torch.nan)
    model.save_pretrained(broken)
    for extra, culprit in (
        (("--config_name", grey), "grey does not restore RGB images"),
        (("--model_name_or_path", broken), "broken returns NaN or infinite values for a ramp of grey"),
    ):
        with pytest.raises(ValueError, match=culprit):
            run(*flags, *extra)
        assert not (tmp_path / "out").exists()


def test_a_result_of_nan_after_the_last_step_is_not_saved(flags, tmp_path):
    with pytest.raises(TrainingDiverged, match="after 1 steps.*lower --learning_rate than 1e\\+25"):
        run(*flags, "--max_train_steps", 1, "--lr_warmup_steps", 0, "--learning_rate", 1e25)
    assert not (tmp_path / "out" / "model.safetensors").exists()


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


def no_image(path: Path) -> None:
    path.write_bytes(b"no image")


def truncated(path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:600])


@pytest.mark.parametrize(
    ("spoil", "culprit"), [(too_small, "bad.jpg.*20x60"), (no_image, "bad.jpg"), (truncated, "bad.jpg")]
)
def test_bad_images_are_named_and_nothing_is_left_behind(flags, tmp_path, spoil, culprit):
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
    with pytest.raises(ValueError, match="Give --train_dir.* or --dataset_name, and not both"):
        run("--train_dir", tmp_path, "--dataset_name", "a/b", "--output_dir", tmp_path / "out")
    with pytest.raises(ValueError, match="--streaming needs --dataset_name"):
        run("--train_dir", tmp_path, "--streaming", "--output_dir", tmp_path / "out")


# --- where the images come from -----------------------------------------------------------------------------------


@pytest.fixture
def dataset(train_dir, tmp_path):
    """The images of `train_dir` as a local dataset of two parquet files with the column `photo`."""
    folder = tmp_path / "photos"
    folder.mkdir()
    paths = list_images(train_dir / "input")
    for shard, own in enumerate((paths[:2], paths[2:])):
        cells = [{"bytes": path.read_bytes(), "path": path.name} for path in own]
        features = datasets.Features({"photo": datasets.Image()})
        datasets.Dataset.from_dict({"photo": cells}, features=features).to_parquet(folder / f"train-{shard}.parquet")
    return folder


def weights(output_dir, checkpoint=""):
    return load_file(output_dir / checkpoint / "model.safetensors")


def test_a_dataset_trains_as_the_folder_of_its_images(flags, dataset, tmp_path):
    of_folder = weights(run(*flags))
    without = flags[2:]
    source = ["--dataset_name", dataset, "--image_column", "photo"]
    of_dataset = weights(run(*without, *source, "--output_dir", tmp_path / "dataset"))
    assert all(torch.equal(tensor, of_dataset[name]) for name, tensor in of_folder.items())


def test_a_stream_killed_and_resumed_is_bitwise_the_whole_run(flags, dataset, tmp_path):
    source = ["--dataset_name", dataset, "--image_column", "photo", "--streaming", "--shuffle_block_size", 3]
    command = [*flags[2:], *source, "--checkpointing_steps", 2]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(*command, "--output_dir", whole)
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoint-4")
    (parts / "model.safetensors").unlink()
    run(*command, "--output_dir", parts, "--resume_from_checkpoint", "latest", "--dataloader_num_workers", 2)
    for checkpoint in ("", "checkpoint-4"):
        expected = weights(whole, checkpoint)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(parts, checkpoint).items())
    state = json.loads((parts / "checkpoint-4" / "trainer_state.json").read_text())
    assert state == {**json.loads((whole / "checkpoint-4" / "trainer_state.json").read_text()), **{
        name: state[name] for name in ("seconds", "arguments")
    }}  # fmt: skip
    card = (parts / "README.md").read_text()
    assert "a stream of clean pictures in 2 shards: 4 steps" in card


def corpus(train_dir, folder):
    """The images below two folders, and a bad one."""
    for index, path in enumerate(list_images(train_dir / "input")):
        (folder / f"part{index % 2}").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / f"part{index % 2}" / path.name)
    truncated(folder / "part0" / "bad.jpg")
    return folder


def test_bad_images_that_are_not_searched_for_are_replaced_and_listed(flags, train_dir, tmp_path):
    folder = corpus(train_dir, tmp_path / "corpus")
    with pytest.raises(ValueError, match="Of 6 images 1 cannot be used.*bad.jpg"):
        run(*flags, "--train_dir", folder)
    lazily = [*flags, "--train_dir", folder, "--check_pictures", "never"]
    output_dir = run(*lazily)
    (row,) = [json.loads(line) for line in (output_dir / "skipped_pictures.jsonl").read_text().splitlines()]
    assert "bad.jpg cannot be read" in row["reason"]
    with pytest.raises(ValueError, match="--max_skipped_share 0 allows.*bad.jpg"):
        run(*lazily, "--max_skipped_share", 0, "--output_dir", tmp_path / "strict")


def test_a_changed_folder_is_refused_on_resume_unless_allowed(flags, train_dir, tmp_path):
    folder = corpus(train_dir, tmp_path / "corpus")
    (folder / "part0" / "bad.jpg").unlink()
    command = [*flags, "--train_dir", folder, "--checkpointing_steps", 2]
    output_dir = run(*command)
    shutil.rmtree(output_dir / "checkpoint-4")
    next((folder / "part1").iterdir()).unlink()
    resume = [*command, "--resume_from_checkpoint", "latest"]
    with pytest.raises(ValueError, match=r"\(5 clean pictures, .* \(4 clean pictures, .*--allow_changed_dataset"):
        run(*resume)
    run(*resume, "--allow_changed_dataset")
    state = json.loads((output_dir / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["dataset"].startswith("4 clean pictures")


def test_a_checkpoint_without_a_digest_of_its_data_goes_on(flags, tmp_path):
    command = [*flags, "--checkpointing_steps", 2]
    expected = weights(run(*command))
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    file = tmp_path / "out" / "checkpoint-2" / "trainer_state.json"
    state = json.loads(file.read_text())
    for name in ("dataset", "positions", "skipped"):
        del state[name]
    file.write_text(json.dumps(state))
    resumed = weights(run(*command, "--resume_from_checkpoint", "latest"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.items())


def launch_two(*command):
    argv = ["--standalone", "--nproc_per_node=2", EXAMPLES / "pretrain.py", *command]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *map(str, argv)],
        capture_output=True, text=True, timeout=280, env=environment,
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_share_a_stream_of_unequal_shards_and_resume_exactly(flags, dataset, tmp_path):
    source = ["--dataset_name", dataset, "--image_column", "photo", "--streaming", "--shuffle_block_size", 2]
    command = [*flags[2:], *source, "--checkpointing_steps", 2]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = launch_two(*command, "--output_dir", whole)
    assert done.returncode == 0, done.stderr[-3000:]
    positions = json.loads((whole / "checkpoint-4" / "trainer_state.json").read_text())["positions"]
    assert len(positions) == 2
    assert all(epoch in (2, 3) for epoch, *_ in positions)  # eight images each, of two or three an epoch
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoint-4")
    done = launch_two(*command, "--output_dir", parts, "--resume_from_checkpoint", "latest")
    assert done.returncode == 0, done.stderr[-3000:]
    expected = weights(whole, "checkpoint-4")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(parts, "checkpoint-4").items())


@pytest.mark.slow
def test_processes_without_an_image_end_the_run_together(flags, dataset, tmp_path):
    single = ["--dataset_name", dataset / "single.parquet", "--image_column", "photo", "--streaming"]
    datasets.load_dataset(str(dataset), split="train").select([0]).to_parquet(dataset / "single.parquet")
    done = launch_two(*flags[2:], *single)
    assert done.returncode != 0
    assert "The dataset has no image for process 1 of 2" in done.stderr
    assert "Process 1 of 2 failed, so this one stops, too" in done.stderr
    assert not (tmp_path / "out").exists()


def test_shares_of_untouched_patches_change_the_run_and_wrong_ones_are_refused(flags, tmp_path):
    plain = load_file(run(*flags) / "model.safetensors")
    spared = load_file(run(*flags, "--overwrite_output_dir", "--untouched_share", "1") / "model.safetensors")
    assert any(not torch.equal(plain[name], tensor) for name, tensor in spared.items())
    with pytest.raises(ValueError, match="together at most 1"):
        run(*flags, "--untouched_share", "0.6", "--light_share", "0.6")
    with pytest.raises(ValueError, match="--enlarged_share must be between 0 and 1, got 1.5"):
        run(*flags, "--enlarged_share", "1.5")
