"""A network that cannot be tuned is refused in one sentence before the work, and one that can is left as it was."""

import sys

import pytest
import torch

from colora_peft.hub import load_backbone
from colora_peft.training import check_base_can_be_made_again

NETWORKS = """
import torch
from torch import nn

def drawn():
    return nn.Conv2d(3, 3, 3, padding=1)

def seeded():
    torch.manual_seed(0)
    return drawn()
"""


@pytest.fixture(autouse=True)
def networks(tmp_path, monkeypatch):
    (tmp_path / "networks_to_check.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("networks_to_check", None)


@pytest.mark.parametrize("method", ["colora", "lora"])
def test_a_base_that_no_later_call_gives_is_refused(method):
    name = "networks_to_check:drawn"
    with pytest.raises(ValueError, match=f"^{name} returns other weights at each call: seed what it draws, or load"):
        check_base_can_be_made_again(load_backbone(name), method, name)


def test_a_base_that_every_call_gives_is_taken_and_nothing_random_changes():
    name = "networks_to_check:seeded"
    model = load_backbone(name)
    torch.rand(3)  # the function's own seed would take this back
    expected, before = model.weight.clone(), torch.get_rng_state()
    check_base_can_be_made_again(model, "colora", name)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(model.weight, expected)


@pytest.mark.parametrize("method", ["full", "decoder", "bias"])
def test_a_network_that_is_saved_itself_may_be_drawn(method):
    check_base_can_be_made_again(load_backbone("networks_to_check:drawn"), method, "networks_to_check:drawn")
