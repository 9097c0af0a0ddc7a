"""examples/adapters: what is shipped fits the shipped network, is small, better than nothing, and says its licence."""

import json
import warnings

import pytest
from huggingface_hub import ModelCard
from support.examples import EXAMPLES

import colora_peft
from examples.experiments.base.ship import TASKS

ADAPTERS = sorted(path.name for path in (EXAMPLES / "adapters").iterdir() if path.is_dir())


def test_the_tasks_with_words_for_their_cards_are_shipped():
    assert sorted(TASKS) == ADAPTERS


@pytest.mark.parametrize("task", ADAPTERS)
def test_a_shipped_adapter_loads_onto_the_base_that_it_names_without_a_warning(task):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of an unknown base
        model = colora_peft.load(EXAMPLES / "adapters" / task)
    assert model.peft_config["default"].base_fingerprint is not None


@pytest.mark.parametrize("task", ADAPTERS)
def test_a_shipped_adapter_is_small_and_its_card_is_its_own(task):
    folder = EXAMPLES / "adapters" / task
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_000_000
    metrics, card = json.loads((folder / "metrics.json").read_text()), ModelCard.load(folder / "README.md")
    assert metrics["psnr_after"] > max(metrics["psnr_before"], metrics["psnr_input"])
    assert f"{metrics['psnr_after']:.2f}" in card.content
    assert TASKS[task].data in card.content and TASKS[task].about in card.content and card.data.license == "other"


@pytest.mark.parametrize("task", ADAPTERS)
def test_images_are_shown_of_photos_alone_that_may_be_passed_on(task):
    images = [path.name for path in (EXAMPLES / "adapters" / task).iterdir() if path.suffix in (".jpg", ".webp")]
    assert images == (["before_after.jpg"] if task == "underwater" else [])
