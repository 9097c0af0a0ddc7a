"""Each method trains its own parameters and no others, and says how many."""

import copy

import pytest
import torch
from peft import PeftModel
from torch import nn

from colora_peft import CoLoRAConfig, adaptable_layers
from colora_peft.models import NAFNetConfig, NAFNetForImageRestoration
from colora_peft.tuning import LEARNING_RATES, METHODS, prepare_for_tuning, trained_parameters


def nafnet():
    torch.manual_seed(0)
    tiny = NAFNetConfig(width=8, encoder_blocks=(1, 1), middle_blocks=1, decoder_blocks=(1, 1))
    return NAFNetForImageRestoration(tiny)


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def config(model, **settings):
    scores = {name: 1.0 if name in ("intro", "ending") else 1e-4 for name in adaptable_layers(model)}
    return CoLoRAConfig(contributions=scores, **settings)


@pytest.mark.parametrize("method", ["full", "decoder", "bias"])
def test_methods_train_exactly_their_parameters_of_the_network_itself(method):
    model = nafnet()
    model.intro.requires_grad_(False)  # whatever was set before
    names = {name for name, _ in model.named_parameters()}
    expected = {
        "full": names,
        "decoder": {name for name in names if name.startswith(("ups.", "decoders.", "ending."))},
        "bias": {name for name in names if name.endswith(".bias")},
    }[method]
    assert prepare_for_tuning(model, method, CoLoRAConfig()) is model
    assert trained_names(model) == expected


def test_decoder_begins_after_the_middle():
    trained = trained_names(prepare_for_tuning(nafnet(), "decoder", CoLoRAConfig()))
    assert {name.split(".")[0] for name in trained} == {"ups", "decoders", "ending"}


def test_biases_of_attention_count():
    model = nn.MultiheadAttention(4, 2)
    assert trained_names(prepare_for_tuning(model, "bias", CoLoRAConfig())) == {"in_proj_bias", "out_proj.bias"}


@pytest.mark.parametrize("method", ["colora", "lora"])
@pytest.mark.parametrize("budget", [0.07, 0.3])
def test_adapters_are_trained_alone_and_within_the_budget(method, budget):
    model = nafnet()
    names = {name for name, _ in model.named_parameters()}
    weights = copy.deepcopy(model.state_dict())
    adapted = prepare_for_tuning(model, method, config(model, parameter_budget=budget))
    assert isinstance(adapted, PeftModel)
    added = {name for name in trained_names(adapted)}
    assert all(".colora_" in name for name in added)
    assert sum(".colora_" not in name for name, _ in adapted.named_parameters()) == len(names)
    sizes = trained_parameters(adapted)
    assert 0.9 * budget < sizes["trainable_ratio"] <= budget
    adapted.unload()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in adapted.base_model.model.state_dict().items())


def test_lora_differs_from_colora_in_the_contributions_alone():
    ranks = {}
    for method in ("colora", "lora"):
        model = nafnet()
        settings = config(model, parameter_budget=0.1, target_modules=["intro", "conv1"])
        ranks[method] = prepare_for_tuning(model, method, settings).peft_config["default"].ranks
        assert settings.ranks is None  # the caller's configuration serves again
    layers = {name for name in adaptable_layers(nafnet()) if name.endswith(("intro", "conv1"))}
    assert ranks["colora"].keys() == ranks["lora"].keys() == layers
    assert ranks["colora"]["intro"] > ranks["lora"]["intro"]


def test_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'lorra'.*colora, lora, full, decoder, bias"):
        prepare_for_tuning(nafnet(), "lorra", CoLoRAConfig())


def test_every_method_has_a_learning_rate():
    assert set(LEARNING_RATES) == set(METHODS)


def test_network_without_such_parameters_is_refused_and_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False))
    with pytest.raises(ValueError, match="decoder_modules"):
        prepare_for_tuning(model, "decoder", CoLoRAConfig())
    with pytest.raises(ValueError, match="no parameters that --method bias"):
        prepare_for_tuning(model, "bias", CoLoRAConfig())
    assert trained_names(model) == {"0.weight"}


# --- figures by hand ------------------------------------------------------------------------------------------------


def small():
    """Weights 3*8 + 8*3 = 48 of two layers, 8 + 3 biases, and a norm of 2 * 8."""
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 3, 1))


@pytest.mark.parametrize(
    ("method", "trained"),
    [("full", 48 + 11 + 16), ("bias", 11 + 8)],
)
def test_figures_of_the_network_itself(method, trained):
    sizes = trained_parameters(prepare_for_tuning(small(), method, CoLoRAConfig()))
    assert sizes == {
        "trainable_parameters": trained,
        "trainable_ratio": pytest.approx(trained / 48),
        "trainable_ratio_of_model": pytest.approx(trained / 75),
    }


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({"ranks": 1}, 11 + 11),  # A and B of each layer: 3 + 8, 8 + 3
        ({"ranks": {"0": 3, "2": 1}}, 24 + 11),  # rank 3 would cost 33 > 24: dense
        ({"ranks": {"0": 0, "2": 1}}, 11),
        ({"ranks": {"0": 0, "2": 1}, "modules_to_save": ["1"]}, 11 + 16),
    ],
)
def test_figures_of_an_adapter(settings, trained):
    sizes = trained_parameters(prepare_for_tuning(small(), "colora", CoLoRAConfig(**settings)))
    assert sizes == {
        "trainable_parameters": trained,
        "trainable_ratio": pytest.approx(trained / 48),
        "trainable_ratio_of_model": pytest.approx(trained / 75),
    }
