"""PEFT's LoRA under a budget: its rank, its layers, and that it begins as the network was."""

import copy

import pytest
import torch
from support.tiny_networks import tiny_nafnet

from colora_peft.ranks.adaptable import adaptable_layers
from colora_peft.training.methods import trained_parameters
from examples.experiments.methods.peft_lora import add_peft_lora


@pytest.mark.parametrize("budget", [0.15, 0.3])
def test_has_the_highest_rank_that_the_budget_pays_for(budget):
    model = add_peft_lora(tiny_nafnet(), budget)
    rank = model.peft_config["default"].r
    used = trained_parameters(model)["trainable_ratio"]
    assert used <= budget < used * (rank + 1) / rank
    with_rank = {p.shape[0] for name, p in model.named_parameters() if "lora_A" in name}
    assert with_rank == {rank}


def test_adapts_all_layers_without_groups_and_those_alone():
    model = add_peft_lora(tiny_nafnet(), 0.3)
    adapted = {
        name.removeprefix("base_model.model.").partition(".lora_A")[0]
        for name, p in model.named_parameters()
        if "lora_A" in name
    }
    assert adapted == {name for name, layer in adaptable_layers(tiny_nafnet()).items() if layer.groups == 1}
    assert all(".lora_" in name for name, p in model.named_parameters() if p.requires_grad)


def test_begins_as_the_network_was_and_counts_its_parameters():
    network = tiny_nafnet().eval()
    bare, image = copy.deepcopy(network), torch.rand(1, 3, 32, 32)
    model = add_peft_lora(network, 0.3)
    with torch.no_grad():
        torch.testing.assert_close(model(image).reconstruction, bare(image).reconstruction, rtol=0, atol=0)
    sizes = trained_parameters(model)
    everything = sum(p.numel() for p in bare.parameters())
    assert sizes["trainable_ratio_of_model"] == pytest.approx(sizes["trainable_parameters"] / everything)


def test_a_budget_below_rank_1_is_refused():
    with pytest.raises(ValueError, match="0.001 does not pay for rank 1"):
        add_peft_lora(tiny_nafnet(), 0.001)
