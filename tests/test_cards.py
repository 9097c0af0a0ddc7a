"""Cards are valid for the Hub and say what the run knew."""

import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn

from colora_peft.cards import RunFacts, adapted_card, backbone_card, hardware_name

FACTS = RunFacts(data="12 photos, CC0", hardware="an abacus", seconds=90.0, processes=2)
METRICS = {
    "method": "colora",
    "seed": 3,
    "trainable_parameters": 12345,
    "trainable_ratio": 0.0699,
    "trainable_ratio_of_model": 0.9876,
    "eval_pairs": 6,
    **{f"psnr_{when}": 20.0 + i for i, when in enumerate(("input", "before", "after"))},
    **{f"ssim_{when}": 0.5 + i / 10 for i, when in enumerate(("input", "before", "after"))},
}


def test_backbone_card_states_data_steps_and_size():
    card = ModelCard(backbone_card(nn.Linear(1000, 1000), "my-net", "Pre-trained for 7 steps.", FACTS))
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-to-image"
    for fact in ("my-net", "1.00 M parameters", "Pre-trained for 7 steps.", "12 photos, CC0", "2 x an abacus"):
        assert fact in card.text


@pytest.mark.parametrize(
    ("base", "linked"), [("someone/nafnet", "someone/nafnet"), ("folder/of/mine", None), ("outputs/pretrain", None)]
)
def test_adapted_card_links_only_a_base_that_is_on_the_hub(base, linked, tmp_path, monkeypatch):
    (tmp_path / "outputs" / "pretrain").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    card = ModelCard(adapted_card("mine", base, "import colora_peft", METRICS, FACTS, is_adapter=True))
    assert card.data.get("base_model") == linked and card.data.library_name == "peft"
    for fact in (base, "12,345 parameters", "6.99%", "22.00", "0.700", "90 seconds", "seed 3", "import colora_peft"):
        assert fact in card.text


def test_card_of_a_whole_network_says_so():
    card = ModelCard(adapted_card("mine", "a/b", "import colora_peft", METRICS, FACTS, is_adapter=False))
    assert card.data.library_name == "transformers" and "98.76% of its parameters" in card.text


def test_hardware_is_named_with_its_threads():
    assert hardware_name(torch.device("cpu")).endswith(f"{torch.get_num_threads()} threads")
