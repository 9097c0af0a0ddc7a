"""Cards are valid for the Hub and say what the run knew."""

import re
import sys
from dataclasses import replace
from importlib.metadata import version

import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn

from colora_peft.hub.cards import (
    AdaptedNetwork,
    RunFacts,
    TuningMetrics,
    adapted_card,
    backbone_card,
    command_line,
    hardware_name,
)

FACTS = RunFacts(data="12 photos | of: mine, CC0", hardware="an abacus", seconds=90.0, processes=2)
METRICS = TuningMetrics(
    method="colora",
    seed=3,
    **{f"psnr_{when}": 20.0 + i for i, when in enumerate(("input", "before", "after"))},
    **{f"ssim_{when}": 0.5 + i / 10 for i, when in enumerate(("input", "before", "after"))},
    trainable_parameters=12345,
    trainable_ratio=0.0699,
    trainable_ratio_of_model=0.9876,
    estimator="gradient",
    seconds_contributions=1.5,
    train_pairs=12,
    eval_pairs=6,
    seconds=90.0,
    learning_rate=1e-3,
    checkerboard_weight=5.0,
    max_train_steps=500,
    parameter_budget=0.07,
    hardware="an abacus",
    processes=2,
    torch="2",
)
RESULT = AdaptedNetwork(
    title="mine: a test",
    loads_from="me/mine",
    base="someone/nafnet",
    base_revision="abc123",
    is_adapter=True,
    images={"before_after.png": "input, restored, target", "contribution.png": "ranks"},
)


def test_backbone_card_states_data_steps_and_size():
    card = ModelCard(backbone_card(nn.Linear(1000, 1000), "my-net", "me/my-net", "Pre-trained for 7 steps.", FACTS))
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-to-image"
    for fact in ("my-net", "1.00 M parameters", "Pre-trained for 7 steps.", "mine, CC0", "2 x an abacus"):
        assert fact in card.text
    assert 'colora_peft.load("me/my-net")' in card.text


def test_adapted_card_says_all_that_the_run_knew():
    card = ModelCard(adapted_card(RESULT, METRICS, FACTS))
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "image-to-image"
    assert card.data.base_model == "someone/nafnet" and "colora" in card.data.tags
    for fact in ("someone/nafnet", "abc123", "12,345 parameters", "6.99%", "budget 7.00%", "22.00", "0.700"):
        assert fact in card.text
    for fact in ("90 seconds", "seed 3", "500 steps", "2 x an abacus", "12 pairs", "6 held out", "mine, CC0"):
        assert fact in card.text
    for package in ("colora-peft", "peft", "transformers", "torch"):
        assert f"{package} {version(package)}" in card.text
    assert "![ranks](contribution.png)" in card.text and "![input, restored, target](before_after.png)" in card.text


def test_figures_are_in_the_index_of_the_hub_and_survive_a_round_trip():
    card = ModelCard(adapted_card(RESULT, METRICS, FACTS))
    assert card.data.model_name == "mine: a test"
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        "psnr": 22.0,
        "ssim": 0.7,
    }
    assert {result.dataset_name for result in card.data.eval_results} == {FACTS.data}
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict()


def test_what_the_user_wrote_breaks_neither_head_nor_table():
    card = adapted_card(RESULT, METRICS, FACTS)
    (row,) = [line for line in card.splitlines() if line.startswith("| Data |")]
    assert len(re.findall(r"(?<!\\)\|", row)) == 3


@pytest.mark.parametrize(
    ("base", "linked"), [("someone/nafnet", "someone/nafnet"), ("folder/of/mine", None), ("outputs/pretrain", None)]
)
def test_only_a_base_that_is_on_the_hub_is_linked_and_another_must_be_passed(base, linked, tmp_path, monkeypatch):
    (tmp_path / "outputs" / "pretrain").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    card = ModelCard(adapted_card(replace(RESULT, base=base), METRICS, FACTS))
    assert card.data.get("base_model") == linked
    call = 'colora_peft.load("me/mine")' if linked else f'colora_peft.load("me/mine", base="{base}")'
    assert call in card.text


def test_a_data_set_of_the_hub_is_linked():
    card = ModelCard(adapted_card(RESULT, METRICS, replace(FACTS, dataset="someone/pairs")))
    assert card.data.datasets == ["someone/pairs"]


def test_card_of_a_whole_network_says_so():
    card = ModelCard(adapted_card(replace(RESULT, is_adapter=False, base="a/b/c"), METRICS, FACTS))
    assert card.data.library_name == "transformers" and "98.76% of its parameters" in card.text
    assert 'colora_peft.load("me/mine")' in card.text and "budget" not in card.text


def test_hardware_is_named_with_its_threads():
    assert hardware_name(torch.device("cpu")).endswith(f"{torch.get_num_threads()} threads")


@pytest.mark.parametrize(
    "extra",
    [
        "--resume_from_checkpoint latest",
        "--resume-from-checkpoint=checkpoint-2",
        "--overwrite_output_dir",
        "--overwrite-output-dir true",
    ],
)
def test_the_command_on_a_card_begins_the_run(monkeypatch, extra):
    monkeypatch.setattr(sys, "argv", ["finetune.py", *extra.split(), "--data_card", "my photos"])
    assert command_line().endswith(" finetune.py --data_card 'my photos'")


def test_a_card_names_an_unusual_precision():
    assert "2 x an abacus |" in adapted_card(RESULT, METRICS, FACTS)
    assert "2 x an abacus, mixed precision bf16 |" in adapted_card(
        RESULT, METRICS, replace(FACTS, mixed_precision="bf16")
    )
