"""Every script under examples/ explains its flags, and says in one sentence what its user can change."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from support.examples import EXAMPLES, load_example
from transformers import HfArgumentParser

ARGUMENTS = {
    "finetune": "FinetuneArguments",
    "pretrain": "PretrainArguments",
    "contribution": "ContributionArguments",
    "restore": "RestoreArguments",
    "export": "ExportArguments",
    "tasks": "TasksArguments",
}
MISTAKES = {
    "finetune": ["--train_dir", "nowhere"],
    "pretrain": ["--train_dir", "nowhere"],
    "contribution": ["--train_dir", "nowhere"],
    "restore": ["--input", "nowhere"],
    "export": ["--adapter", "nowhere"],
    "tasks": ["--data_dir", "nowhere"],
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_flag_is_explained(name):
    parser = HfArgumentParser(getattr(load_example(name), ARGUMENTS[name]))
    assert all(action.help for action in parser._actions)
    parser.format_help()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name != "finetune" else []) for name in MISTAKES]
)
def test_errors_reach_the_terminal_as_one_sentence(name, tmp_path):
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *MISTAKES[name]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith(f"{name}.py: ") and "nowhere" in message
    assert not list(tmp_path.iterdir())


DESTINATIONS = {
    "finetune": ["--output_dir", "file/below"],
    "pretrain": ["--train_dir", "nowhere", "--output_dir", "file/below"],
    "contribution": ["--output_dir", "file/below"],
    "restore": ["--input", "photo.png", "--output_dir", "file/below"],
    "export": ["--adapter", "nowhere", "--output_file", "file/below/a.onnx"],
    "tasks": ["--data_dir", "tasks", "--output_dir", "file/below"],
    "app": [],
}


@pytest.mark.parametrize("name", DESTINATIONS)
def test_a_destination_that_cannot_be_written_is_found_out_before_the_work(name, tmp_path, monkeypatch):
    """A file is in the way; as root, permissions do not bind."""
    if name == "app":
        pytest.importorskip("gradio", reason="the extra demo is not installed")
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Image.new("RGB", (8, 8)).save("photo.png")
    for side in ("train", "test"):
        Path("tasks/haze", side).mkdir(parents=True)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "file/below")
    script = load_example(name)
    for work in ("load_backbone", "load_pairs", "open_patches", "load_base", "load_merged"):
        monkeypatch.setattr(script, work, None, raising=False)
    arguments = getattr(script, {**ARGUMENTS, "app": "PageArguments"}[name])
    (args,) = HfArgumentParser(arguments).parse_args_into_dataclasses(DESTINATIONS[name])
    with pytest.raises(ValueError, match="file/below.* cannot be written: file is "):
        getattr(script, "launch" if name == "app" else "main")(args)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "photo.png", "tasks"]
