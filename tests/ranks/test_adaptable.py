"""Layers that are left out are named with the reason and the remedy, and the remedy works."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

from colora_peft import CoLoRAConfig, adaptable_layers, estimate_contributions
from colora_peft.ranks import ContributionScores, left_out, why_not_adaptable
from colora_peft.training import report_allocation

CASES = {
    "weight_norm": (parametrizations.weight_norm, "weight_norm", parametrize.remove_parametrizations),
    "spectral_norm": (parametrizations.spectral_norm, "spectral_norm", parametrize.remove_parametrizations),
    "old weight_norm": (old_weight_norm, "weight_norm", lambda layer, _: remove_weight_norm(layer)),
    "old spectral_norm": (old_spectral_norm, "spectral_norm", lambda layer, _: remove_spectral_norm(layer)),
    "pruning": (lambda layer: prune.identity(layer, "weight"), "pruning", prune.remove),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("case", CASES)
def test_computed_weights_are_named_with_a_remedy_that_works(case):
    normed, name, remove = CASES[case]
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 3, 3)).eval()
    for layer in network:
        normed(layer)
    x = torch.rand(1, 3, 9, 9)
    before = network(x)
    assert f"computed by {name}: call torch.nn.utils." in why_not_adaptable(network[0])
    for run in (
        lambda: get_peft_model(network, CoLoRAConfig(ranks=1)),
        lambda: estimate_contributions(network, [x], lambda model, batch: model(batch).sum(), "gradient"),
    ):
        message = rf"no layer that can be adapted\. Left out: 2 whose weight {name} computes \(.*remove.*: 0, 1\."
        with pytest.raises(ValueError, match=message):
            run()
    for layer in network:
        remove(layer, "weight")
    torch.testing.assert_close(network(x), before)
    assert list(adaptable_layers(network)) == ["0", "1"] and not left_out(network)


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.intro = nn.Linear(4, 4)
        self.attention = nn.ModuleList(nn.MultiheadAttention(4, 2) for _ in range(7))
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8)
        self.normed = parametrizations.weight_norm(nn.Linear(4, 4))


def test_the_table_names_what_is_left_out(capsys, tmp_path):
    network = Attentive()
    scores = ContributionScores({"intro": 1.0}, "gradient", 1, 1.0)
    report_allocation(network, {"intro": 1}, scores, tmp_path)
    *_, total, attention, encoder, normed = capsys.readouterr().out.strip().splitlines()
    assert "1 of 1 layers adapted" in total
    assert attention == (
        "Left out: 7 nn.MultiheadAttention (their weights are read without a call): attention.0, attention.1, "
        "attention.2, attention.3, attention.4 and 2 more"
    )
    assert encoder.startswith("Left out: 1 nn.TransformerEncoderLayer") and encoder.endswith(": encoder")
    assert "1 whose weight weight_norm computes" in normed and normed.endswith(": normed")


def test_nothing_is_said_of_networks_whose_layers_are_all_adaptable():
    assert left_out(nn.Sequential(nn.Conv2d(3, 3, 1), nn.LayerNorm(3))) == []
