"""Each method trains its own parameters and no others, and says how many."""

import copy

import pytest
import torch
from peft import PeftModel
from torch import nn

from colora_peft import CoLoRAConfig, adaptable_layers, adapter_parameters, weight_matrix_shape
from colora_peft.models import NAFNetConfig, NAFNetForImageRestoration
from colora_peft.training.methods import LEARNING_RATES, METHODS, prepare_for_tuning, trained_parameters


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


# One rank for all comes in steps: of this tiny network, rank 2 takes 16.8% and rank 4 33.1%.
@pytest.mark.parametrize(("method", "budget"), [("colora", 0.07), ("colora", 0.3), ("lora", 0.17), ("lora", 0.34)])
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


def test_lora_has_one_rank_in_the_targeted_layers_and_the_next_would_not_fit():
    model = nafnet()
    settings = config(model, parameter_budget=0.25, target_modules=["intro", "conv1"])
    adapted = prepare_for_tuning(model, "lora", settings)
    assert settings.ranks is None  # the caller's configuration serves again
    layers = {name: layer for name, layer in adaptable_layers(nafnet()).items() if name.endswith(("intro", "conv1"))}
    shapes = {name: weight_matrix_shape(layer) for name, layer in layers.items()}
    (rank,) = {value for name, value in adapted.peft_config["default"].ranks.items() if value < min(shapes[name])}
    ranks = adapted.peft_config["default"].ranks
    assert ranks == {name: shape.stored_rank(rank) for name, shape in shapes.items()}
    allowed = 0.25 * sum(d * k for d, k in shapes.values())
    costs = [sum(adapter_parameters(r, d, k) for d, k in shapes.values()) for r in (rank, rank + 1)]
    assert costs[0] <= allowed < costs[1]


def test_lora_without_a_budget_for_rank_1_says_which_would_do():
    with pytest.raises(ValueError, match="rank 1 in every layer takes .* parameter_budget to at least 0") as error:
        prepare_for_tuning(nafnet(), "lora", config(nafnet(), parameter_budget=0.01))
    enough = float(str(error.value).split("at least ")[1].split(",")[0])
    assert prepare_for_tuning(nafnet(), "lora", config(nafnet(), parameter_budget=enough))


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
