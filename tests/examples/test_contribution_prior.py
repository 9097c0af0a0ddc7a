"""examples/contribution_prior.py: what it writes is what `CoLoRAConfig()` uses, and its complaints."""

import json
import shutil
import subprocess
import sys

import pytest
from peft import get_peft_model
from support.examples import EXAMPLES, load_example, write_pairs
from transformers import AutoModelForImageToImage

from colora_peft import CoLoRAConfig

prior = load_example("contribution_prior")


@pytest.fixture
def network(tiny_nafnet, tmp_path):
    return shutil.copytree(tiny_nafnet, tmp_path / "network")


def ranks_of(folder, **settings):
    model = get_peft_model(AutoModelForImageToImage.from_pretrained(folder), CoLoRAConfig(**settings))
    return model.peft_config["default"].ranks


def test_launched_prior_is_the_mean_of_the_tasks_and_decides_the_ranks(network, tmp_path):
    folders = [str(write_pairs(tmp_path / name, count)) for name, count in (("one", 3), ("other", 4))]
    flags = ["--model_name_or_path", str(network), "--resolution", "32", "--probe_batches", "1"]
    uniform = ranks_of(network)
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "contribution_prior.py"), "--train_dirs", *folders, *flags],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    scores = json.loads((network / "config.json").read_text())["colora_contributions"]
    args = prior.PriorArguments(folders, str(network), resolution=32, probe_batches=1)
    expected = prior.mean_scores([prior.measure(task, prior.Accelerator()) for task in args.tasks()])
    assert scores == pytest.approx(expected, rel=1e-3) and sum(scores.values()) == pytest.approx(1, rel=1e-3)
    assert ranks_of(network) == ranks_of(network, contributions=scores) != uniform
    assert ranks_of(network, beta=0) == uniform


def test_a_folder_without_a_network_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere is no folder with a config.json"):
        prior.PriorArguments(["a"], str(tmp_path / "nowhere"))
