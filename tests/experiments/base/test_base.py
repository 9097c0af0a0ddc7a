"""examples/experiments/base: the comparison of pre-trained networks, and the check of their training photos."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from colora_peft.images import to_pil
from examples.experiments.base import adapt, evaluate, scenes


def photo(seed, height=80, width=96):
    """A picture with large shapes, as scenes have."""
    coarse = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return to_pil(torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)[0])


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for seed in range(4):
        photo(seed).save(folder / ("more" if seed % 2 else ".") / f"{seed}.png")
    return folder


# ------------------------------------------------------------------------------------------------------------- scenes


def scene_arguments(tmp_path, photos, test_photo):
    folder = tmp_path / "tasks" / "haze" / "test" / "target"
    folder.mkdir(parents=True)
    test_photo.save(folder / "a.jpg", quality=60)
    output = str(tmp_path / "scenes.json")
    return scenes.SceneArguments(str(photos), str(tmp_path / "tasks"), output_file=output)


def test_other_scenes_pass_and_the_highest_correlation_is_kept(tmp_path, photos):
    scenes.main(scene_arguments(tmp_path, photos, photo(9)))
    row = json.loads((tmp_path / "scenes.json").read_text())["haze"]
    assert row["correlation"] < 0.9 and row["test_image"] == "target/a.jpg" and row["test_images"] == 1


@pytest.mark.parametrize("is_mirrored", [False, True])
def test_a_scaled_and_compressed_copy_is_found(tmp_path, photos, is_mirrored):
    copy = photo(3).resize((64, 40))
    copy = copy.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if is_mirrored else copy
    with pytest.raises(ValueError, match="share a scene with the training photos: haze"):
        scenes.main(scene_arguments(tmp_path, photos, copy))
    assert json.loads((tmp_path / "scenes.json").read_text())["haze"]["training_photo"] == "more/3.png"


def test_a_picture_of_one_colour_correlates_with_nothing(tmp_path):
    Image.new("RGB", (40, 40), "grey").save(tmp_path / "grey.png")
    assert not scenes.thumbnail(tmp_path / "grey.png").any()


# --------------------------------------------------------------------------------------------------------- comparison


@pytest.fixture
def networks(tiny_nafnet, tmp_path):
    """A network that changes its input, and one that does not."""
    weights = load_file(tiny_nafnet / "model.safetensors")
    for name, factor in (("old", 1.0), ("new", 0.0)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text((tiny_nafnet / "config.json").read_text())
        ending = {key: tensor * factor if key.startswith("ending") else tensor for key, tensor in weights.items()}
        save_file(ending, folder / "model.safetensors", metadata={"format": "pt"})
    return [str(tmp_path / "old"), str(tmp_path / "new")]


def test_networks_are_compared_on_the_same_pictures(photos, networks, tmp_path):
    pair = tmp_path / "noise"
    for side in ("input", "target"):
        (pair / side).mkdir(parents=True)
        photo(5 if side == "target" else 6).save(pair / side / "a.png")
    args = evaluate.BaseArguments(
        networks, [str(photos)], str(pair), resolution=32, draws=2, output_dir=str(tmp_path / "out")
    )
    evaluate.main(args)
    figures = json.loads((tmp_path / "out" / "base.json").read_text())["psnr"]
    assert len(figures) == 5 * 3 + 4
    for row in figures.values():  # this network returns its input
        assert row["new"] == pytest.approx(row["input"]) and np.isfinite(row["old"])
    assert figures["untouched"]["new"] == 100 > figures["untouched"]["old"]
    assert figures["noise, weak"]["input"] > figures["noise, strong"]["input"]
    assert "| untouched, worst photo | 100.00 |" in (tmp_path / "out" / "base.md").read_text()


def test_networks_of_one_name_are_refused():
    with pytest.raises(ValueError, match="different names"):
        evaluate.BaseArguments(["a/net", "b/net"], ["photos"])


# --------------------------------------------------------------------------------------------------------- adaptation


@pytest.mark.slow
def test_a_cell_is_a_run_of_finetune_that_is_not_made_again(train_dir, networks, tmp_path, capsys):
    task = tmp_path / "tasks" / "haze"
    for part in ("train", "test"):
        shutil.copytree(train_dir, task / part)
    sizes = {"max_train_steps": 2, "resolution": 16, "per_device_train_batch_size": 2, "parameter_budget": 0.5}
    args = adapt.AdaptArguments(
        networks, str(tmp_path / "tasks"), ["haze"], draws=1, output_dir=str(tmp_path / "out"), **sizes
    )
    adapt.main(args)
    found = json.loads((tmp_path / "out" / "adapt.json").read_text())
    assert [cell["network"] for cell in found] == ["old", "new"] and found[0]["psnr_after"] != found[1]["psnr_after"]
    assert "| haze |" in capsys.readouterr().out
    seconds = [cell["seconds"] for cell in found]
    adapt.main(args)
    assert [cell["seconds"] for cell in json.loads((tmp_path / "out" / "adapt.json").read_text())] == seconds


def test_a_cell_is_on_the_loss_of_the_committed_ones(networks, tmp_path, monkeypatch):
    """The default of finetune.py has changed since."""
    (tmp_path / "tasks" / "haze" / "train" / "target").mkdir(parents=True)
    args = adapt.AdaptArguments(networks, str(tmp_path / "tasks"), ["haze"], output_dir=str(tmp_path / "out"))
    commands = []
    failed = subprocess.CompletedProcess([], 1, stderr="stopped")
    monkeypatch.setattr(adapt.subprocess, "run", lambda command, **_: commands.append(command) or failed)
    with pytest.raises(ValueError, match="stopped"):
        adapt.main(args)
    assert "--checkerboard_weight 0" in " ".join(commands[0])


def test_a_failed_adaptation_says_why(networks, tmp_path):
    (tmp_path / "tasks" / "haze" / "train" / "target").mkdir(parents=True)
    args = adapt.AdaptArguments(networks, str(tmp_path / "tasks"), ["haze"], output_dir=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="'task': 'haze'.* failed: finetune.py:"):
        adapt.main(args)


def test_networks_are_compared_by_the_draws_that_all_have():
    found = [
        {"task": task, "draw": draw, "network": name, "psnr_input": 10.0, "psnr_after": psnr}
        for task, draw, name, psnr in [
            *[("rain", 0, "old", 20.0), ("rain", 0, "new", 21.0), ("rain", 1, "old", 30.0), ("rain", 1, "new", 33.0)],
            *[("rain", 2, "old", 50.0), ("haze", 0, "old", 15.0)],
        ]
    ]
    assert adapt.table(found).splitlines()[2:] == [
        "| rain | 10.00 | 25.00 | 27.00 | +2.00 ± 1.00 (2) |",
        "| mean of the tasks | 10.00 | 25.00 | 27.00 | +2.00 ± 1.00 (1 task) |",
    ]
