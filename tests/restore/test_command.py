"""The installed command: the program of examples/restore.py without a clone, and so without its network."""

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.adapters import adapters as adapters  # a fixture
from support.sources import ROOT

from colora_peft.images import read_image
from colora_peft.restore import RestoreArguments, command


@pytest.fixture
def photo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((24, 20), 60).convert("RGB").save("photo.png")
    Image.new("RGB", (9, 9), "teal").save("other.png")


def launch(*words):
    done = subprocess.run(
        [sys.executable, "-m", "colora_peft.restore", *map(str, words)], capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr
    return done


def ending(monkeypatch, *words):
    """The exit code or message of the command in this process."""
    monkeypatch.setattr("sys.argv", ["colora-restore", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        command.run_command()
    return end.value.code


def test_the_command_is_installed_and_explains_its_flags(photo):
    declared = re.search(r'^colora-restore = "(.*):(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert getattr(import_module(declared[1]), declared[2]) is command.run_command
    done = launch("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: colora-restore [INPUT ...]") and "--adapter" in done.stdout


def test_a_photo_and_an_adapter_are_enough(photo, adapters, tiny_nafnet):
    from colora_peft import load, restore_image

    done = launch("photo.png", "--adapter", adapters["haze"], "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "1 written, 0 kept as they were, 0 failed. Results are in outputs/restored." in done.stdout
    expected = restore_image(load(adapters["haze"]), read_image("photo.png")).clamp(0, 1).mul(255).round() / 255
    assert torch.equal(read_image("outputs/restored/photo.png"), expected)


def test_images_may_stand_before_and_after_flags(photo, monkeypatch):
    seen = []
    monkeypatch.setattr(command, "plan_jobs", lambda inputs, *args: seen.append(list(inputs)) or [])
    monkeypatch.setattr(command, "device_of", lambda args: sys.exit(0))
    for words in (
        ["photo.png", "other.png"],
        ["--tile", 64, "photo.png", "--overlap", 8, "other.png"],
        ["photo.png", "--input", "other.png"],
        ["--input", "photo.png", "other.png"],
    ):
        assert ending(monkeypatch, *words) == 0
    assert seen == 4 * [["photo.png", "other.png"]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "colora-restore: There is nothing to restore: name images, folders or patterns first, then the flags."),
        (["--adapter", "someone/haze", "photo.png"], "colora-restore: There is nothing to restore: name images"),
        (["photo.png"], "colora-restore: There is no network: give --adapter, which says what it is for, or --model"),
        (["photo.png", "--adaptor", "a"], "colora-restore: There is no flag --adaptor; --help lists all."),
        (["nowhere.png"], "colora-restore: There is no file or folder nowhere.png"),
    ],
)
def test_mistakes_are_one_sentence(photo, monkeypatch, words, said):
    assert ending(monkeypatch, *words).startswith(said)
    assert sorted(os.listdir()) == ["other.png", "photo.png"]


def test_the_example_alone_brings_a_network(photo, monkeypatch):
    with pytest.raises(ValueError, match="There is no network"):
        command.restore_images(RestoreArguments(input=["photo.png"]))
    shipped = ROOT / "examples" / "checkpoints" / "nafnet-small-prod"
    assert command.restore_images(RestoreArguments(input=["photo.png"], device="cpu"), str(shipped)) == 0
    assert Path("outputs/restored/photo.png").exists()
