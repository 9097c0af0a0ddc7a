"""Every script under examples/ explains its flags, and says in one sentence what its user can change."""

import subprocess
import sys

import pytest
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
