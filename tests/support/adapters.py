"""Two adapters of their own weights for the tiny network, and the set of them."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from colora_peft import CoLoRAConfig
from colora_peft.hub import load_backbone
from colora_peft.restore import AdapterSet, adapters_in


@pytest.fixture(scope="module")
def adapters(tiny_nafnet, tmp_path_factory):
    """Folders of the two, by name."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("haze", "rain")):
        torch.manual_seed(seed)
        get_peft_model(load_backbone(str(tiny_nafnet)), CoLoRAConfig(ranks=2, init_weights=False)).save_pretrained(
            folder / name
        )
    (folder / "notes").mkdir()
    return adapters_in(folder)


def network(folder: str | Path):
    """The bare network, laid out as the page has it: other layouts round otherwise."""
    return load_backbone(str(folder)).to(memory_format=torch.channels_last)


def adapter_set(folder, adapters) -> AdapterSet:
    return AdapterSet(network(folder), adapters)
