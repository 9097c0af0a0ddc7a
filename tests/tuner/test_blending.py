"""Weighted sums of adapters: their deltas add up, also through files, merging and stock LoRA."""

import copy

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from support.tiny_networks import network
from torch import nn

from colora_peft import CoLoRAConfig, adaptable_layers

pytestmark = pytest.mark.usefixtures("grad_mode")

# Ranks that differ and agree, dense in one or in both, layers that only one of them adapts.
HAZE = {"conv": 1, "blocks.0.conv": 1000, "blocks.0.mix": 2, "down": 3, "gate": 2, "head": 1}
RAIN = {"conv": 2, "blocks.0.conv": 1000, "blocks.0.mix": 1000, "down": 4, "up": 1, "head": 0}
WEIGHTS = [(1.0, 1.0), (0.5, 0.5), (1.5, -0.7), (-1.0, 0.0)]


def adapted(haze=HAZE, rain=RAIN):
    """(bare network, the same with adapters `haze` and `rain`, input)."""
    bare, x = network()
    settings = {"init_weights": False}
    model = get_peft_model(copy.deepcopy(bare), CoLoRAConfig(ranks=dict(haze), **settings), "haze")
    model.add_adapter("rain", CoLoRAConfig(ranks=dict(rain), colora_alpha=2.0, **settings))
    return bare.eval(), model.eval(), x


def summed(bare, model, weights):
    """The bare network with the weighted deltas in its weights."""
    expected = copy.deepcopy(bare)
    for name, layer in adaptable_layers(expected).items():
        adapted_layer = model.base_model.model.get_submodule(name)
        for adapter, weight in weights.items():
            if adapter in getattr(adapted_layer, "rank", {}):
                layer.weight.data += weight * adapted_layer.get_delta_weight(adapter).detach()
    return expected


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("settings", [{}, {"combination_type": "svd", "svd_rank": 1000}], ids=["cat", "svd"])
def test_exact_sums(weights, settings, tmp_path):
    bare, model, x = adapted()
    model.add_weighted_adapter(["haze", "rain"], list(weights), "blend", **settings)
    expected = summed(bare, model, dict(zip(["haze", "rain"], weights, strict=True)))(x)
    model.set_adapter("blend")
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path / "blend").eval()
    torch.testing.assert_close(loaded(x), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=0, atol=1e-5)


def test_blending_leaves_the_sources_and_the_active_adapter_alone():
    _, model, x = adapted()
    before, names = model(x), {n: p.clone() for n, p in model.named_parameters()}
    torch.manual_seed(7)
    random = torch.rand(1)
    torch.manual_seed(7)
    model.add_weighted_adapter(["haze", "rain"], [1.0, -1.0], "blend")
    assert torch.equal(torch.rand(1), random)
    assert model.active_adapter == "haze" and torch.equal(model(x), before)
    for name, parameter in model.named_parameters():
        if name.endswith(".blend"):
            assert not parameter.requires_grad
        else:
            assert torch.equal(parameter, names[name])
    assert model.peft_config["blend"].inference_mode and not model.peft_config["haze"].inference_mode


def test_ranks_of_a_blend():
    _, model, _ = adapted()
    model.add_weighted_adapter(["haze", "rain"], [1.0, 1.0], "cat")
    model.add_weighted_adapter(["haze", "rain"], [1.0, 1.0], "svd", "svd")
    model.add_weighted_adapter(["haze"], [2.0], "twice", "linear")
    ranks = {name: model.peft_config[name].ranks for name in ("haze", "cat", "svd", "twice")}
    # 8 x 32: factors of rank 7 cost more than the weight; 8 x 8: of rank 4.
    assert ranks["cat"] == {
        "conv": 3, "blocks.0.conv": 8, "blocks.0.mix": 8, "down": 8, "gate": 2, "head": 1, "up": 1,
    }  # fmt: skip
    assert ranks["svd"] == ranks["cat"] | {"conv": 2, "down": 4}
    assert {name: rank for name, rank in ranks["twice"].items() if rank} == ranks["haze"]


@pytest.mark.parametrize("rank", [1, 2])
def test_svd_is_the_nearest_of_its_rank(rank):
    """Eckart and Young: what is left of the sum has the norm of the singular values that were cut."""
    _, model, _ = adapted()
    model.add_weighted_adapter(["haze", "rain"], [1.0, -0.5], "cat")
    model.add_weighted_adapter(["haze", "rain"], [1.0, -0.5], "svd", combination_type="svd", svd_rank=rank)
    layer = model.base_model.model.conv
    whole, nearest = (layer.delta_matrix(name) for name in ("cat", "svd"))
    assert torch.linalg.matrix_rank(nearest) == rank
    cut = torch.linalg.svdvals(whole)[rank:].square().sum().sqrt()
    torch.testing.assert_close((whole - nearest).norm(), cut, rtol=1e-4, atol=1e-5)
    assert all(parameter.is_contiguous() for parameter in model.parameters())  # or safetensors refuses them


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(12, 16), nn.Linear(16, 10)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


@pytest.mark.parametrize("weights", [*WEIGHTS, (1.5, 0.3)], ids=str)
def test_linear_is_what_pefts_lora_computes(weights):
    """The same factors in stock LoRA, blended there: cross terms and signs included."""
    if min(weights) < 0 and Version(peft.__version__) < Version("0.21"):
        pytest.skip("this PEFT blends LoRA with negative weights otherwise")
    torch.manual_seed(0)
    bare, x = Mlp().eval(), torch.randn(4, 12)
    ours = get_peft_model(copy.deepcopy(bare), CoLoRAConfig(ranks=2, init_weights=False), "haze").eval()
    ours.add_adapter("rain", CoLoRAConfig(ranks=2, colora_alpha=1.0, init_weights=False))
    stock_config = LoraConfig(r=2, lora_alpha=2, target_modules=["first", "last"])
    stock = get_peft_model(copy.deepcopy(bare), stock_config, "haze").eval()
    stock.add_adapter("rain", LoraConfig(r=2, lora_alpha=2, target_modules=["first", "last"]))
    for name in ("first", "last"):
        mine, theirs = ours.base_model.model.get_submodule(name), stock.base_model.model.get_submodule(name)
        for adapter in ("haze", "rain"):
            theirs.lora_A[adapter].weight.data.copy_(mine.colora_A[adapter])
            theirs.lora_B[adapter].weight.data.copy_(mine.colora_B[adapter])
            theirs.scaling[adapter] = mine.scaling[adapter]
    used = [(name, weight) for name, weight in zip(["haze", "rain"], weights, strict=True) if weight]
    for model in (ours, stock):
        model.add_weighted_adapter([n for n, _ in used], [w for _, w in used], "blend", combination_type="linear")
        model.set_adapter("blend")
    torch.testing.assert_close(ours(x), stock(x), rtol=0, atol=1e-5)
    assert not torch.allclose(ours(x), bare(x), atol=1e-3)


def test_linear_of_dense_layers_is_exact():
    bare, model, x = adapted(dict.fromkeys(HAZE, 1000), dict.fromkeys(HAZE, 1000))
    model.add_weighted_adapter(["haze", "rain"], [0.4, -0.9], "blend", combination_type="linear")
    expected = summed(bare, model, {"haze": 0.4, "rain": -0.9})(x)
    model.set_adapter("blend")
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)


def test_set_scale_counts():
    bare, model, x = adapted()
    for layer in model.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("haze", 0.5)
    model.add_weighted_adapter(["haze"], [1.0], "halved")
    model.set_adapter("halved")
    torch.testing.assert_close(model(x), summed(bare, model, {"haze": 1.0})(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((["haze", "fog"], [1.0, 1.0], "blend"), {}, "'?fog'?.*haze, rain"),
        (([], [], "blend"), {}, "no adapters to blend"),
        ((["haze", "haze"], [1.0, 1.0], "blend"), {}, "each once"),
        ((["haze", "rain"], [1.0], "blend"), {}, r"\[1.0\]"),
        ((["haze", "rain"], [1.0, float("nan")], "blend"), {}, "nan"),
        ((["haze", "rain"], [0.0, 0.0], "blend"), {}, "All weights are 0"),
        ((["haze", "rain"], [1.0, 1.0], "rain"), {}, "'rain': delete it first"),
        ((["haze", "rain"], [1.0, 1.0], "half"), {}, "'half' is that of an attribute"),
        ((["haze", "rain"], [1.0, 1.0], "blend"), {"combination_type": "ties"}, "'ties'"),
        ((["haze", "rain"], [1.0, 1.0], "blend"), {"combination_type": "linear"}, "'conv' has ranks \\[1, 2\\]"),
        ((["haze", "rain"], [1.0, 1.0], "blend"), {"svd_rank": 2}, "only with 'svd'"),
        ((["haze", "rain"], [1.0, 1.0], "blend"), {"combination_type": "svd", "svd_rank": 0}, "svd_rank is 0"),
    ],
)
def test_bad_arguments_are_named_and_change_nothing(arguments, settings, message):
    _, model, x = adapted()
    before, names = model(x), set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments, **settings)
    assert list(model.peft_config) == ["haze", "rain"]
    assert set(model.state_dict()) == names and torch.equal(model(x), before)


def test_whole_modules_cannot_be_blended():
    bare, _ = network()
    model = get_peft_model(bare, CoLoRAConfig(ranks=1, modules_to_save=["head"]), "haze")
    with pytest.raises(ValueError, match="'haze' trains whole modules"):
        model.add_weighted_adapter(["haze"], [1.0], "blend")
