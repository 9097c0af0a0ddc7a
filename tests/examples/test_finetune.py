"""examples/finetune.py: launched as a user would, then its laws and its complaints in one process."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from support.examples import EXAMPLES, write_pairs
from support.finetune import QUICK, metrics_of, run

from colora_peft.training import TrainingDiverged


@pytest.fixture
def flags(train_dir, eval_dir, tiny_nafnet, tmp_path):
    folders = ["--train_dir", train_dir, "--eval_dir", eval_dir, "--model_name_or_path", tiny_nafnet]
    return [*folders, *QUICK, "--output_dir", tmp_path / "out"]


def test_launched_run_leaves_all_a_user_needs_and_its_snippet_loads_it(flags, eval_dir, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", str(EXAMPLES / "finetune.py"), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    output_dir = tmp_path / "out"
    files = {path.name for path in output_dir.iterdir()}
    assert files >= {
        "preprocessor_config.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "metrics.json",
        "before_after.png",
    }
    assert files >= {"contribution.png", "contributions.json", "README.md", "train_log.jsonl", "checkpoint-4"}
    metrics = metrics_of(output_dir)
    assert 0 < metrics["trainable_ratio"] <= 0.07
    assert {"psnr_input", "psnr_before", "ssim_after", "seconds", "method", "seed"} <= metrics.keys()

    card = ModelCard.load(output_dir / "README.md")
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "image-to-image"
    snippet = re.findall(r"```python\n(.*?)```", card.content, re.DOTALL)[-1]
    assert snippet.strip() in done.stdout
    # The snippet in a fresh process, with evaluation after it, gives the figure that the run wrote.
    check = f"""{snippet}
import torch
from colora_peft.evaluation import evaluate
from colora_peft.data import PairedImageFolder
print(evaluate(model, PairedImageFolder({str(eval_dir)!r}), torch.device("cpu"), "")["psnr"])
"""
    Image.new("RGB", (40, 24), "teal").save(tmp_path / "photo.jpg")
    loaded = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=tmp_path)
    assert loaded.returncode == 0, loaded.stderr
    assert float(loaded.stdout) == pytest.approx(metrics["psnr_after"], abs=1e-3)
    assert Image.open(tmp_path / "restored.png").size == (40, 24)


def test_same_seed_gives_same_figures_and_other_seed_others(flags, tmp_path):
    first = metrics_of(run(*flags))
    again = metrics_of(run(*flags, "--output_dir", tmp_path / "again"))
    other = metrics_of(run(*flags, "--output_dir", tmp_path / "other", "--seed", 1))
    assert first["psnr_after"] == again["psnr_after"] and first["ssim_after"] == again["ssim_after"]
    assert first["psnr_after"] != other["psnr_after"]
    assert first["psnr_before"] == other["psnr_before"]


def test_resumed_run_equals_an_uninterrupted_one_bitwise(flags, tmp_path):
    whole = run(*flags)
    shutil.copytree(whole, tmp_path / "resumed")
    for left in ("adapter_model.safetensors", "metrics.json", "README.md"):
        (tmp_path / "resumed" / left).unlink()
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4")
    resumed = run(*flags, "--output_dir", tmp_path / "resumed", "--resume_from_checkpoint", "latest")
    expected = load_file(whole / "adapter_model.safetensors")
    found = load_file(resumed / "adapter_model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("method", ["lora", "full", "decoder", "bias"])
def test_peers_train_and_load(flags, tiny_nafnet, method):
    from peft import PeftModel
    from transformers import AutoModelForImageToImage

    output_dir = run(*flags, "--method", method, "--parameter_budget", 0.1)  # rank 1 takes 8% of the tiny network
    metrics = metrics_of(output_dir)
    assert metrics["method"] == method
    base = tiny_nafnet if method == "lora" else output_dir
    model = AutoModelForImageToImage.from_pretrained(base)
    if method == "lora":
        model = PeftModel.from_pretrained(model, output_dir)
        assert metrics["trainable_ratio"] <= 0.1
    before = AutoModelForImageToImage.from_pretrained(tiny_nafnet)
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(model(x).reconstruction, before(x).reconstruction)


def test_several_inputs_of_a_target_side_by_side_are_counted_and_held_out_together(tiny_nafnet, tmp_path, capsys):
    for path in write_pairs(tmp_path / "pairs", 3).rglob("*.png"):
        for word in ("noisy1", "Noisy2") if path.parent.name == "input" else ("clean",):
            shutil.copy(path, tmp_path / f"{path.stem}_{word}.png")
    shutil.rmtree(tmp_path / "pairs")
    (tmp_path / "notes.txt").touch()
    flags = ["--train_dir", tmp_path, "--input_pattern", "{}_noisy*", "--target_pattern", "{}_clean", *QUICK]
    run(*flags, "--model_name_or_path", tiny_nafnet, "--output_dir", tmp_path / "out")
    output = capsys.readouterr().out
    assert f"{tmp_path}: 6 inputs of 3 targets." in output and "4 pairs to train on, 2 to evaluate on" in output
    assert f"{tmp_path}: 1 file left out: 1 .txt." in output
    held_out = re.search(r"2 of those to train on are held out \((.*)_Noisy2, (.*)_noisy1\)", output)
    assert held_out is not None and held_out[1] == held_out[2]


def test_a_longer_run_learns_the_task(flags):
    """The task exchanges red and blue, which no unadapted network does."""
    metrics = metrics_of(run(*flags, "--max_train_steps", 60, "--checkpointing_steps", 60))
    assert metrics["psnr_after"] > metrics["psnr_input"] + 1 and metrics["psnr_after"] > metrics["psnr_before"] + 1


def test_the_last_evaluation_of_the_training_is_that_of_the_result(flags):
    output_dir = run(*flags, "--validation_steps", 3, "--use_ema", "--ema_decay", 0.5)
    three, four = [json.loads(line) for line in (output_dir / "validation_log.jsonl").read_text().splitlines()]
    metrics = metrics_of(output_dir)
    assert (three["step"], four["step"]) == (3, 4)
    assert four["psnr"] == pytest.approx(metrics["psnr_after"], abs=1e-6)
    assert four["psnr_input"] == pytest.approx(metrics["psnr_input"], abs=1e-6)
    averages = load_file(output_dir / "checkpoint-4" / "ema.safetensors")
    stored = load_file(output_dir / "adapter_model.safetensors")
    assert len(averages) == len(stored)
    for name, tensor in averages.items():
        assert torch.equal(stored[name.replace(".default", "")], tensor)


def test_without_eval_dir_a_fifth_is_held_out(train_dir, tiny_nafnet, tmp_path, capsys):
    flags = ["--train_dir", train_dir, "--model_name_or_path", tiny_nafnet, *QUICK, "--method", "bias"]
    metrics = metrics_of(run(*flags, "--output_dir", tmp_path / "out"))
    assert (metrics["train_pairs"], metrics["eval_pairs"]) == (4, 1)
    assert "held out" in capsys.readouterr().out


def test_hugging_face_dataset_gives_the_same_as_folders(flags, train_dir, eval_dir, tiny_nafnet, tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "dataset"
    folder.mkdir()
    for split, source in (("train", train_dir), ("test", eval_dir)):
        names = sorted(path.name for path in (source / "input").iterdir())
        columns = {side: [str(source / side / name) for name in names] for side in ("input", "target")}
        dataset = datasets.Dataset.from_dict(columns)
        for side in columns:
            dataset = dataset.cast_column(side, datasets.Image())
        dataset = dataset.map(lambda row: row)  # reads the files, so that the parquet file holds the images
        dataset.to_parquet(folder / f"{split}-00000.parquet")
    from_folders = metrics_of(run(*flags))
    from_dataset = metrics_of(
        run("--dataset_name", folder, "--model_name_or_path", tiny_nafnet, *QUICK, "--output_dir", tmp_path / "hub")
    )
    assert from_dataset["psnr_after"] == from_folders["psnr_after"]


# -------------------------------------------------------------------------------------------------------- bad input


def orphan(folder: Path) -> None:
    (folder / "target" / "scene1.png").unlink()


def empty(folder: Path) -> None:
    for path in (folder / "input").iterdir():
        path.unlink()


def other_size(folder: Path) -> None:
    Image.new("RGB", (40, 48)).save(folder / "target" / "scene2.png")


def unreadable(folder: Path) -> None:
    (folder / "input" / "scene0.png").write_bytes(b"no image")


def linked_to_nothing(folder: Path) -> None:
    (folder / "target" / "scene1.png").unlink()
    (folder / "target" / "scene1.png").symlink_to("nowhere.png")


def too_small(folder: Path) -> None:
    for side in ("input", "target"):
        Image.new("RGB", (20, 48)).save(folder / side / "scene1.png")


def missing(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("spoil", "culprit"),
    [
        (orphan, "scene1"),
        (empty, "holds no images"),
        (other_size, "scene2"),
        (unreadable, "scene0.png"),
        (linked_to_nothing, "target/scene1.png cannot be read .No such file"),
        (too_small, "scene1.*20x48"),
        (missing, "no folder"),
    ],
)
def test_bad_pairs_are_named_and_nothing_is_left_behind(spoil, culprit, eval_dir, tiny_nafnet, tmp_path):
    folder = write_pairs(tmp_path / "pairs", 3)
    spoil(folder)
    flags = ["--train_dir", folder, "--eval_dir", eval_dir, "--model_name_or_path", tiny_nafnet, *QUICK]
    with pytest.raises((ValueError, FileNotFoundError), match=culprit):
        run(*flags, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("bad", "culprit"),
    [
        (["--parameter_budget", "1.5"], "parameter_budget"),
        (["--parameter_budget", "0"], "parameter_budget"),
        (["--learning_rate", "-1"], "learning_rate"),
        (["--max_train_steps", "0"], "max_train_steps"),
        (["--max_train_samples", "99"], "99"),
        (["--max_train_samples", "0"], "0"),
        (["--probe_batches", "0"], "probe_batches"),
        (["--probe_steps", "0"], "probe_steps"),
        # Found out only when ranks are allocated, after the network was evaluated and probed.
        (["--parameter_budget", "1e-6"], "parameter_budget to at least"),
        (["--input_pattern", "noisy"], "--input_pattern noisy has no"),
        (["--dataset_name", "somebody/pairs"], "exclude each other"),
        (["--resume_from_checkpoint", "checkpoint-7"], "no readable checkpoint"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(flags, tmp_path, bad, culprit):
    with pytest.raises(ValueError, match=culprit):
        run(*flags, *bad)
    assert not (tmp_path / "out").exists()


def test_pairs_to_train_on_are_no_pairs_to_evaluate_on(flags, train_dir, tmp_path):
    with pytest.raises(ValueError, match="--eval_dir is --train_dir"):
        run(*flags, "--eval_dir", train_dir.parent / "." / train_dir.name)
    assert not (tmp_path / "out").exists()


def test_a_result_of_nan_after_the_last_step_is_not_saved(flags, tmp_path):
    with pytest.raises(TrainingDiverged, match="NaN or infinite .* after 1 steps.*lower --learning_rate than 1e\\+20"):
        run(*flags, "--learning_rate", "1e20", "--max_train_steps", 1)
    assert not {path.name for path in (tmp_path / "out").iterdir()} & {"adapter_model.safetensors", "metrics.json"}


@pytest.mark.parametrize(
    ("resolution", "weight", "notes"), [(16, 5.0, False), (12, 0.0, True)], ids=["acts", "few-periods"]
)
def test_a_loss_on_checkerboards_that_cannot_act_is_said_and_recorded_as_none(
    flags, capsys, resolution, weight, notes
):
    output_dir = run(*flags, "--resolution", resolution)
    assert metrics_of(output_dir)["checkerboard_weight"] == weight
    note = "--checkerboard_weight has no effect: patches of 12 pixels hold fewer than 4 periods of 4 a side"
    assert (note in capsys.readouterr().out) == notes


def test_a_finished_run_survives_an_overwrite_that_fails(flags):
    output_dir = run(*flags, "--method", "bias")
    with pytest.raises(ValueError, match="parameter_budget"):
        run(*flags, "--overwrite_output_dir", "--parameter_budget", "1e-6")
    assert metrics_of(output_dir)["method"] == "bias" and (output_dir / "model.safetensors").is_file()


def test_inputs_that_are_copies_of_their_targets_are_refused(flags, train_dir, tmp_path):
    shutil.copytree(train_dir / "target", tmp_path / "same" / "input")
    shutil.copytree(train_dir / "target", tmp_path / "same" / "target")
    with pytest.raises(ValueError, match="equal to their targets: there is nothing to learn"):
        run(*flags, "--train_dir", tmp_path / "same")
    assert not (tmp_path / "out").exists()


def test_a_missing_network_is_named(flags, tmp_path):
    with pytest.raises((OSError, ValueError), match="nowhere"):  # which one depends on the version of transformers
        run(*flags, "--model_name_or_path", tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_an_existing_run_is_kept_unless_told_otherwise(flags, tmp_path):
    output_dir = run(*flags, "--method", "bias")
    before = {path.name: path.stat().st_mtime_ns for path in output_dir.iterdir()}
    with pytest.raises(ValueError, match="already holds a run.*overwrite"):
        run(*flags)
    assert before == {path.name: path.stat().st_mtime_ns for path in output_dir.iterdir()}
    assert metrics_of(run(*flags, "--overwrite_output_dir"))["method"] == "colora"
