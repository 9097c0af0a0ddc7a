"""Helpers shared by tests: those of restore/test_adapter_switch.py."""

import pytest
import torch
from peft import get_peft_model
from support.examples import load_example

from colora_peft import CoLoRAConfig
from colora_peft.hub.networks import load_backbone

switching = load_example("adapter_switch")


@pytest.fixture(scope="module")
def adapters(tiny_nafnet, tmp_path_factory):
    """Two adapters of their own weights."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("haze", "rain")):
        torch.manual_seed(seed)
        get_peft_model(load_backbone(str(tiny_nafnet)), CoLoRAConfig(ranks=2, init_weights=False)).save_pretrained(
            folder / name
        )
    (folder / "notes").mkdir()
    return switching.adapters_in(folder)
