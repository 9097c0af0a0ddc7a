"""A network that cannot be tuned is refused in one sentence before the work, and one that can is left as it was."""

import sys

import pytest
import torch
from torch import nn

from colora_peft.hub import load_backbone
from colora_peft.training import (
    TrainingDiverged,
    check_base_can_be_made_again,
    check_budget,
    check_result_is_finite,
    check_takes_images,
    refusals_in_words,
)

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


# -------------------------------------------------------------------------------------------------------------- images


class Halves(nn.Module):
    """Runs on even sides only."""

    needs_multiple_of = 2

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 12, 2, stride=2), nn.BatchNorm2d(12), nn.PixelShuffle(2))

    def forward(self, images):
        return images + self.down(images)


class OneSize(nn.Module):
    def forward(self, images):
        assert images.shape[-1] == 224, "of another height than the model"


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, images):
        return torch.full_like(images, self.value)


class Fails(nn.Module):
    def forward(self, images):
        raise RuntimeError("no such size\nand a long explanation" if images.shape[-1] < 10 else "")


@pytest.mark.parametrize(
    ("network", "side", "message"),
    [
        (
            nn.Conv2d(1, 1, 3),
            64,
            r"^own:grey does not restore RGB images of shape \(1, 3, 64, 64\): Given groups=1, [^\n]*$",
        ),
        (Fails(), 8, r"^own:grey does not restore RGB images of shape \(1, 3, 8, 8\): no such size$"),
        (Fails(), 16, r"^own:grey does not restore RGB images of shape \(1, 3, 16, 16\): RuntimeError$"),
        (OneSize(), 8, r"does not restore RGB images of shape \(1, 3, 8, 8\): of another height than the model$"),
        (nn.PixelShuffle(2), 8, "does not restore RGB images"),
        (Constant(torch.inf), 8, "^own:grey returns NaN or infinite values for a ramp of grey, before any training"),
        (nn.Upsample(scale_factor=2), 8, r"^own:grey does not restore .* must keep the shape\. It enlarges 2 times"),
    ],
)
def test_a_network_that_does_not_restore_rgb_images_is_refused_in_one_sentence(network, side, message):
    with pytest.raises(ValueError, match=message):
        check_takes_images(network, "own:grey", side)


def test_a_network_that_does_stays_as_it_was_and_gets_sides_that_it_takes():
    network, seen = Halves().train(), []
    network.register_forward_hook(lambda _, args, output: seen.append((*args[0].shape, output.requires_grad)))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    check_takes_images(network, "own:network", 17)
    assert seen == [(1, 3, 18, 18, False)] and network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(("method", "enough"), [("colora", 0.09), ("lora", 0.26)])
def test_a_budget_that_is_too_small_whatever_the_scores_is_refused_for_adapters_alone(method, enough):
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 3))  # of 432 weights; ranks of 35 and 75
    for budget in (0.01, enough - 0.01):
        with pytest.raises(ValueError, match="set parameter_budget to at least 0"):
            check_budget(network, method, budget)
        check_budget(network, "full", budget)
    check_budget(network, method, enough)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_result_that_is_not_finite_is_refused_with_the_rate_to_lower(value):
    check_result_is_finite(Constant(0.5), 8, 10, 1e-3)
    with pytest.raises(TrainingDiverged, match=r"after 10 steps, so its result is not saved\. .*rate than 0\.001\.$"):
        check_result_is_finite(Constant(value), 8, 10, 1e-3)


def test_a_refusal_is_told_by_name_with_the_remedy_and_want_of_memory_as_it_is():
    with pytest.raises(ValueError, match=r"^own:unet fails: Sizes must match \(set it\)$"):
        with refusals_in_words("own:unet fails", remedy="set it"):
            raise RuntimeError("Sizes must match\nAnd more.")
    with pytest.raises(torch.OutOfMemoryError), refusals_in_words("own:unet fails"):
        raise torch.OutOfMemoryError("full")
    with pytest.raises(RuntimeError, match="can't allocate memory$"), refusals_in_words("own:unet fails"):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
