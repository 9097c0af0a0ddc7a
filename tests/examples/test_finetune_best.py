"""examples/finetune.py and pretrain.py with --save_best: the folder is a result of its own, and the card names it."""

import json
import re

import pytest
import torch
from huggingface_hub import ModelCard
from support.examples import load_example
from support.finetune import QUICK, metrics_of, run

import colora_peft
from colora_peft.data import PairedImageFolder
from colora_peft.evaluation import evaluate


@pytest.mark.parametrize("method", ["colora", "full"])
def test_the_best_step_loads_and_has_its_figures_and_cards(train_dir, eval_dir, tiny_nafnet, tmp_path, method):
    data = ["--train_dir", train_dir, "--eval_dir", eval_dir, "--model_name_or_path", tiny_nafnet, *QUICK]
    best = ["--validation_steps", 1, "--save_best", "--learning_rate", 0.1, "--max_train_steps", 5]
    output_dir = run(*data, *best, "--method", method, "--output_dir", tmp_path / "out")
    row = json.loads((output_dir / "best" / "metrics.json").read_text())
    assert row["psnr"] >= metrics_of(output_dir)["psnr_after"]
    figures = evaluate(colora_peft.load(output_dir / "best"), PairedImageFolder(eval_dir), torch.device("cpu"), "")
    assert figures["psnr"] == pytest.approx(row["psnr"], abs=1e-3)
    line = f"| Best step | {row['step']}, in the folder `best` of the run: PSNR {row['psnr']:.2f} dB"
    card, own = (ModelCard.load(folder / "README.md").content for folder in (output_dir, output_dir / "best"))
    assert line in card and line in own
    assert f"| **after** | **{row['psnr']:.2f}** |" in own and "![" not in own
    (snippet,) = re.findall(r'colora_peft.load\("(.*)"\)', own)
    assert snippet == str(output_dir / "best")


def test_pretraining_keeps_it_too(train_dir, tmp_path):
    pretrain = load_example("pretrain")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "nafnet", "width": 4, "encoder_blocks": [1], "middle_blocks": 1,
                                  "decoder_blocks": [1]}))  # fmt: skip
    photos, output_dir = str(train_dir / "target"), tmp_path / "out"
    args = pretrain.PretrainArguments(
        train_dir=photos, eval_dir=photos, config_name=str(config), output_dir=str(output_dir), max_train_steps=3,
        per_device_train_batch_size=1, resolution=16, lr_warmup_steps=0, validation_steps=1, save_best=True,
    )  # fmt: skip
    pretrain.main(args)
    row = json.loads((output_dir / "best" / "metrics.json").read_text())
    assert (
        f"Best step of the validation: {row['step']}, in the folder `best`" in (output_dir / "README.md").read_text()
    )
    assert colora_peft.load(output_dir / "best").config.width == 4
    assert f"step {row['step']}" in (output_dir / "best" / "README.md").read_text()


def test_the_card_of_a_prolonged_run_says_so(train_dir, eval_dir, tiny_nafnet, tmp_path):
    flags = ["--train_dir", train_dir, "--eval_dir", eval_dir, "--model_name_or_path", tiny_nafnet, *QUICK]
    flags += ["--output_dir", tmp_path / "out"]
    run(*flags)
    output_dir = run(*flags, "--max_train_steps", 6, "--resume_from_checkpoint", "latest")
    assert metrics_of(output_dir)["max_train_steps"] == 6
    assert "| Training | 6 steps, prolonged after step 4 of 4, " in (output_dir / "README.md").read_text()
