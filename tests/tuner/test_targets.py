"""Which layers an adapter goes on and which ranks they get."""

import copy
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.tiny_networks import network
from torch import nn

from colora_peft import CoLoRAConfig, CoLoRALayer

EVERY_LAYER = [
    "conv",
    "blocks.0.conv",
    "blocks.0.mix",
    "blocks.1.conv",
    "blocks.1.mix",
    "down",
    "up",
    "gate",
    "head",
]
TOWARDS_THE_FIRST = {name: 10.0**-i for i, name in enumerate(EVERY_LAYER)}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, EVERY_LAYER),
        ({"target_modules": ["conv"]}, ["conv", "blocks.0.conv", "blocks.1.conv"]),
        ({"target_modules": r"blocks\.\d+\.mix"}, ["blocks.0.mix", "blocks.1.mix"]),
        ({"target_modules": "all-linear"}, ["gate"]),
        ({"target_modules": ["conv", "mix"], "exclude_modules": ["1.conv"]}, [*EVERY_LAYER[:3], EVERY_LAYER[4]]),
        ({"exclude_modules": r"blocks.*|.*own"}, ["conv", "up", "gate", "head"]),
        ({"modules_to_save": ["head"]}, EVERY_LAYER[:-1]),
    ],
)
@pytest.mark.parametrize("explicit", [False, True], ids=["first", "from_its_own_ranks"])
def test_targets_follow_pefts_rules(settings, expected, explicit):
    bare, x = network()
    config = CoLoRAConfig(ranks=1, **settings)
    model = get_peft_model(bare, config)
    if explicit:  # as loading does: the configuration that injection has left behind
        model = get_peft_model(network()[0], copy.deepcopy(config))
    assert list(config.ranks) == expected
    wrapped = [name for name, module in model.get_base_model().named_modules() if isinstance(module, CoLoRALayer)]
    assert wrapped == expected
    model(x).sum().backward()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"target_modules": ["mix"], "layers_to_transform": [1]}, ["body.blocks.1.mix"]),
        ({"layers_to_transform": 0, "layers_pattern": "blocks"}, ["body.blocks.0.conv", "body.blocks.0.mix"]),
    ],
)
def test_blocks_are_chosen_by_index(settings, expected):
    """Inside `body`, because up to PEFT 0.20 a list of blocks at the top of a network is not found."""
    config = CoLoRAConfig(ranks=1, **settings)
    get_peft_model(nn.Sequential(OrderedDict(body=network()[0])), config)
    assert list(config.ranks) == expected


def test_ranks_by_name_match_whole_names_only():
    model = get_peft_model(network()[0], CoLoRAConfig(ranks={"conv": 1}))
    assert [n for n, m in model.get_base_model().named_modules() if isinstance(m, CoLoRALayer)] == ["conv"]


def test_rank_zero_leaves_the_layer_alone():
    model = get_peft_model(network()[0], CoLoRAConfig(ranks={"conv": 1, "head": 0})).get_base_model()
    assert type(model.head) is nn.Conv2d and not model.head.weight.requires_grad


def test_contributions_decide_and_cover_more_than_the_targets():
    scores = {name: 2.0**-i for i, name in enumerate(EVERY_LAYER)}
    config = CoLoRAConfig(contributions=scores, parameter_budget=0.2, beta=2, target_modules=["mix", "gate", "up"])
    get_peft_model(network()[0], config)
    # 89 of 448 parameters: the first dense 8 x 8 costs 64, then one rank 16; alpha is 16 and 64, for `up` 640.
    assert list(config.ranks.items()) == [("blocks.0.mix", 8), ("blocks.1.mix", 1), ("up", 0), ("gate", 0)]


@pytest.mark.parametrize(
    ("settings", "name", "allowed"),
    [
        ({"max_rank_pattern": {"head": 1}}, "head", {0, 1}),
        ({"max_rank_pattern": {"blocks.0.conv": 0, "conv": 8}}, "blocks.0.conv", {0}),
        ({"max_rank_pattern": {"conv": 8, "blocks.0.conv": 0}}, "blocks.0.conv", set(range(1, 9))),
        ({"max_rank_pattern": {r"blocks\.\d\.mix": 1}}, "blocks.1.mix", {1}),
        ({"min_rank_pattern": {"mix": 2}, "max_rank_pattern": {"mix": 2}}, "blocks.0.mix", {2}),
        (
            {"min_rank_pattern": {"up": 3}, "parameter_budget": 0.5, "beta": 4, "contributions": TOWARDS_THE_FIRST},
            "up",
            {3},
        ),
    ],
)
def test_bounds_are_matched_as_pefts_rank_pattern(settings, name, allowed, tmp_path):
    model = get_peft_model(network()[0], CoLoRAConfig(**{"parameter_budget": 0.9, **settings}))
    ranks = model.peft_config["default"].ranks
    assert ranks[name] in allowed
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(network()[0], tmp_path).peft_config["default"]
    assert loaded.ranks == ranks and loaded.max_rank_pattern == settings.get("max_rank_pattern", {})


def with_prior(scores):
    model, _ = network()
    model.config = SimpleNamespace(colora_contributions=scores)
    return model


def test_contributions_that_the_network_brings_along_decide_unless_others_are_given():
    scores = {name: 2.0**-i for i, name in enumerate(EVERY_LAYER)}
    reverse = dict(zip(scores, reversed(scores.values()), strict=True))

    def ranks(model, **settings):
        config = CoLoRAConfig(parameter_budget=0.5, **settings)
        get_peft_model(model, config)
        return config.ranks

    def bare():
        return network()[0]

    assert ranks(with_prior(scores)) == ranks(bare(), contributions=scores) != ranks(bare())
    assert ranks(with_prior(scores), contributions=reverse) == ranks(bare(), contributions=reverse)
    assert ranks(with_prior(scores), beta=0) == ranks(bare())
    assert ranks(with_prior(scores), target_modules=["mix"]) == ranks(
        bare(), contributions=scores, target_modules=["mix"]
    )
    assert ranks(with_prior(scores), ranks=1) == ranks(bare(), ranks=1)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"conv": 1.0}, "lacks the targeted layer .*or beta=0 for uniform ranks"),
        (dict.fromkeys(EVERY_LAYER, 0.0), "is 0 for every targeted layer: pass `contributions`"),
        (dict.fromkeys(EVERY_LAYER, float("nan")), "scores must be finite"),
        ([1.0], "no table of layer name to score"),
    ],
)
def test_contributions_of_a_network_that_do_not_fit_it_are_refused(scores, message):
    with pytest.raises(ValueError, match=f"^The config.colora_contributions of Restorer .*{message}"):
        get_peft_model(with_prior(scores), CoLoRAConfig())


def test_ranks_survive_more_targets_than_peft_lists():
    """From 20 targets on PEFT shortens target_modules to suffixes; ranks must not depend on them."""

    def deep():
        return nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(30)])

    names = [f"{i}.0" for i in range(25)]
    config = CoLoRAConfig(target_modules=names, ranks={name: 1 for name in names})
    get_peft_model(deep(), config)
    again = get_peft_model(deep(), CoLoRAConfig(ranks=config.ranks, target_modules=config.target_modules))
    assert sum(isinstance(module, CoLoRALayer) for module in again.modules()) == 25


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"ranks": {"conv": 1, "heads": 1}}, ValueError, "'heads'.*did you mean 'head'"),
        ({"ranks": {"conv": 1, "blocks.0.norm": 1}}, ValueError, "'blocks.0.norm'"),
        ({"ranks": {"conv": 1, "up": 0}, "target_modules": ["conv", "up"]}, ValueError, "'blocks.0.conv' is missing"),
        ({"ranks": {"conv": 1}, "exclude_modules": ["conv"]}, ValueError, "^Nothing.*matches no layer of Restorer"),
        ({"ranks": 0}, ValueError, "All ranks are 0"),
        ({"ranks": {"conv": 0}}, ValueError, "All ranks are 0"),
        ({"contributions": {**dict.fromkeys(EVERY_LAYER, 1.0), "hed": 1.0}}, ValueError, "'hed'.*did you mean 'head'"),
        ({"contributions": {"conv": 1.0}}, ValueError, "'blocks.0.conv' is missing from `contributions`"),
        ({"target_modules": ["nothing"]}, ValueError, "'nothing'.* matches no layer of Restorer"),
        (
            {"max_rank_pattern": {"hed": 1}},
            ValueError,
            "'hed' in `max_rank_pattern` matches no targeted layer.*'head'",
        ),
        (
            {"min_rank_pattern": {"head": 1}, "exclude_modules": ["head"]},
            ValueError,
            "'head' in `min_rank_pattern` matches no targeted layer",
        ),
        ({"min_rank_pattern": {"mix": 8}}, ValueError, "minima .* alone take 128 .* set parameter_budget to at least"),
        ({"parameter_budget": 1e-6}, ValueError, "set parameter_budget to at least 0"),
        ({"target_modules": ["norm"]}, TypeError, "'blocks.0.norm' is a GroupNorm.*ConvTranspose2d"),
        ({"target_modules": ["blocks.1"]}, TypeError, "'blocks.1' is a Block"),
    ],
)
def test_bad_choice_of_layers_is_one_clear_sentence(settings, error, message):
    bare, x = network()
    expected = bare(x)
    with pytest.raises(error, match=message) as caught:
        get_peft_model(bare, CoLoRAConfig(**settings))
    text = str(caught.value)
    assert text[0].isupper() and text.endswith(".") and text.count("ConvTranspose2d") <= 1
    assert not any(isinstance(module, CoLoRALayer) for module in bare.modules())
    assert torch.equal(bare(x), expected)


# --- layers that are in use in two places ---------------------------------------------------------------------------


def test_single_layer_as_the_whole_model_is_refused():
    with pytest.raises(ValueError, match=r"single Linear layer.*nn\.Sequential\(model\)\.$"):
        get_peft_model(nn.Linear(4, 4), CoLoRAConfig(ranks=1))


def tied(second):
    """Three layers, of which `second` holds the weight of the first."""
    model = nn.Sequential(OrderedDict(first=nn.Linear(4, 4), second=second, third=nn.Linear(4, 4)))
    model.second.weight = model.first.weight
    return model


@pytest.mark.parametrize("second", [nn.Linear(4, 4), nn.Embedding(4, 4)], ids=["layer", "embedding"])
@pytest.mark.parametrize("settings", [{"ranks": 1}, {"parameter_budget": 0.9}, {"ranks": {"first": 1}}])
def test_weight_that_another_module_shares_is_refused(second, settings):
    model = tied(second)
    with pytest.raises(ValueError, match=r"'first' shares its weight with 'second'.*\.$"):
        get_peft_model(model, CoLoRAConfig(**settings))
    assert type(model.first) is nn.Linear


@pytest.mark.parametrize(
    "settings",
    [{"ranks": 1, "exclude_modules": ["first", "second"]}, {"ranks": {"first": 0, "second": 0, "third": 1}}],
)
def test_tied_layers_may_be_left_alone(settings):
    model = get_peft_model(tied(nn.Linear(4, 4)), CoLoRAConfig(**settings)).get_base_model()
    assert isinstance(model.third, CoLoRALayer) and model.first.weight is model.second.weight
    with pytest.raises(ValueError, match="'second' shares its weight with 'first'"):
        get_peft_model(tied(nn.Linear(4, 4)), CoLoRAConfig(ranks=1, exclude_modules=["first"]))


def test_layer_under_two_names_is_refused():
    model = nn.Sequential(OrderedDict(first=nn.Linear(4, 4), other=nn.Linear(4, 4)))
    model.second = model.first
    with pytest.raises(ValueError, match=r"'first' is also registered as 'second'.*\.$"):
        get_peft_model(model, CoLoRAConfig(ranks=1))
    assert type(model.first) is nn.Linear
    get_peft_model(model, CoLoRAConfig(ranks=1, exclude_modules=["first"]))
    assert isinstance(model.other, CoLoRALayer) and type(model.first) is nn.Linear


def test_block_under_two_names_is_adapted_for_both(tmp_path):
    def recurrent():
        bare, x = network()
        bare.blocks[1] = bare.blocks[0]
        return bare.eval(), x

    bare, x = recurrent()
    config = CoLoRAConfig(ranks=1, init_weights=False, target_modules=["mix"])
    model = get_peft_model(bare, config).eval()
    expected = model(x)
    assert config.ranks == {"blocks.0.mix": 1} and isinstance(bare.blocks[1].mix, CoLoRALayer)
    assert not torch.allclose(expected, recurrent()[0](x), atol=1e-4)
    model.save_pretrained(tmp_path)
    torch.manual_seed(9)
    loaded = PeftModel.from_pretrained(recurrent()[0], tmp_path).eval()
    torch.testing.assert_close(loaded(x), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=0, atol=1e-5)


def test_second_adapter_on_wrapped_layers_is_no_second_place():
    model = get_peft_model(network()[0], CoLoRAConfig(ranks=1))
    model.add_adapter("rain", CoLoRAConfig(ranks=2))
    assert list(model.peft_config["rain"].ranks) == EVERY_LAYER


@pytest.mark.parametrize(
    ("compiled", "what"),
    [
        (lambda: torch.compile(nn.Sequential(nn.Conv2d(3, 3, 1))), "The network is compiled"),
        (lambda: nn.Sequential(torch.compile(nn.Sequential(nn.Conv2d(3, 3, 1)))), "The module '0' is compiled"),
    ],
    ids=["whole", "part"],
)
def test_a_compiled_network_is_refused_and_left_as_it_was(compiled, what):
    model = compiled()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=f"^{what}, .* adapt the network first, then compile what"):
        get_peft_model(model, CoLoRAConfig(ranks=1))
    assert [name for name, _ in model.named_modules()] == names


def test_a_network_that_was_compiled_in_place_keeps_its_names():
    model, x = nn.Sequential(nn.Conv2d(3, 3, 1)), torch.rand(1, 3, 4, 4)
    model.compile(backend="eager")
    bare = model(x)
    adapted = get_peft_model(model, CoLoRAConfig(ranks=1, init_weights=False))
    assert set(adapted.peft_config["default"].ranks) == {"0"}
    assert not torch.allclose(adapted(x), bare)
