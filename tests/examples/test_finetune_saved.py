"""examples/finetune.py: the card has the figures of the saved adapter, whatever training moves in the base."""

import json
import sys
from pathlib import Path

import pytest
import torch
from support.examples import load_example
from transformers import HfArgumentParser

import colora_peft
from colora_peft.data import PairedImageFolder
from colora_peft.evaluation import evaluate

finetune = load_example("finetune")

NETWORKS = """
import torch
from torch import nn

class Average(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().mean(), 0.5)
        return x - self.mean

def with_norm():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 3, padding=1))

def with_average():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Average(), nn.Conv2d(8, 3, 3, padding=1))

def from_support(kind):
    from support.reading_networks import reading_network

    return reading_network(kind)

def partly_deployed():
    from support.reading_networks import Deployed

    return from_support(Deployed)

def reparametrized():
    from support.reading_networks import Reparametrized

    return from_support(Reparametrized)

def deployed():
    from support.reading_networks import Deployed

    torch.manual_seed(0)
    return nn.Sequential(Deployed(3))

calls = []

def changed_later():
    calls.append(1)
    torch.manual_seed(len(calls) > 2)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1))
"""


@pytest.fixture
def tune(train_dir, eval_dir, tmp_path, monkeypatch):
    """Tunes the network that a function makes; the metrics, and the PSNR of what was saved on a fresh base."""
    (tmp_path / "moving_networks.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "moving_networks", raising=False)  # calls are counted from here

    def run(function, *flags):
        name = f"moving_networks:{function}"
        sizes = ["--max_train_steps", 6, "--per_device_train_batch_size", 2, "--resolution", 32]
        sizes += ["--parameter_budget", 0.3, "--learning_rate", 0.01]
        data = ["--train_dir", train_dir, "--eval_dir", eval_dir, "--model_name_or_path", name, "--output_dir", "out"]
        parser = HfArgumentParser(finetune.FinetuneArguments)
        (args,) = parser.parse_args_into_dataclasses([str(flag) for flag in (*data, *sizes, *flags)])
        finetune.main(args)
        metrics = json.loads(Path("out/metrics.json").read_text())
        if function == "changed_later":
            return metrics, None
        loaded = colora_peft.load("out", base=name)
        return metrics, evaluate(loaded, PairedImageFolder(eval_dir), torch.device("cpu"), "")["psnr"]

    return run


@pytest.mark.parametrize("method", ["colora", "lora"])
def test_running_statistics_stay_and_nothing_is_said(tune, capsys, method):
    metrics, saved = tune("with_norm", "--method", method)
    assert saved == pytest.approx(metrics["psnr_after"], abs=1e-3)
    assert metrics["psnr_after"] != metrics["psnr_before"] and "Note" not in capsys.readouterr().out


def test_other_buffers_that_move_are_named_and_the_card_has_what_is_saved(tune, capsys):
    metrics, saved = tune("with_average")
    out = capsys.readouterr().out
    assert saved == pytest.approx(metrics["psnr_after"], abs=1e-3)
    assert "because training moved 1.mean, buffers that no adapter holds" in out and "   saved: PSNR" in out
    after = next(line for line in out.splitlines() if "after: PSNR" in line)
    assert f"{metrics['psnr_after']:.2f}" not in after


def test_a_base_that_is_another_after_the_training_is_said(tune, capsys):
    tune("changed_later")
    assert "Note: the saved adapter cannot be loaded onto moving_networks:changed_later." in capsys.readouterr().out


CASES = [("partly_deployed", ["1.k3"]), ("reparametrized", [])]


@pytest.mark.parametrize("function, left", CASES)
def test_a_network_that_reads_weights_itself_is_trained_as_it_is_evaluated(tune, capsys, function, left):
    metrics, saved = tune(function)
    out = capsys.readouterr().out
    assert saved == pytest.approx(metrics["psnr_after"], abs=1e-3) and abs(saved - metrics["psnr_before"]) > 0.05
    line = next((line for line in out.splitlines() if line.startswith("Left alone")), "")
    assert all(name in line for name in left) and bool(line) == bool(left) and "Note" not in out


def test_a_network_that_no_adapter_can_follow_is_refused_before_training(tune, tmp_path):
    with pytest.raises(ValueError, match="weights of .*0.k1.*0.k3.* in a way that no adapter can follow"):
        tune("deployed", "--parameter_budget", 0.5)
    assert not list(tmp_path.glob("out/checkpoint*"))
