"""Laws of one adapted layer: for every kind of layer and both storages, factors and dense."""

import copy
import math

import pytest
import torch
from support.layer import CASES, STORAGES, ScaledConv, adapted, make_case, shake
from torch import nn

from colora_peft.ranks.adaptable import adaptable_layers, weight_matrix_shape, why_not_adaptable
from colora_peft.tuner.functional import run_with_weight
from colora_peft.tuner.layer import CoLoRALayer
from colora_peft.tuner.scaling import adapter_scaling


@pytest.fixture(params=[(case, storage) for case in CASES for storage in STORAGES], ids="-".join)
def case(request):
    return make_case(*request.param)


def test_new_adapter_is_bitwise_the_identity(case):
    bare, layer, x = case
    assert torch.equal(layer(x), bare(x))
    assert torch.equal(layer.eval()(x), bare(x))


def test_output_is_that_of_a_plain_layer_with_the_delta_in_its_weight(case):
    bare, layer, x = case
    shake(layer)
    matrix = weight_matrix_shape(bare)
    if layer.colora_dense:
        delta = layer.scaling["default"] * layer.colora_dense["default"]
    else:
        factors = torch.einsum("dr,rk->dk", layer.colora_B["default"], layer.colora_A["default"])
        delta = layer.scaling["default"] * factors
        assert delta.shape == matrix
    expected = copy.deepcopy(bare)
    expected.weight.data += delta.detach().reshape(bare.weight.shape)
    torch.testing.assert_close(layer(x), expected(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(layer(x), bare(x), atol=1e-3)


def test_merged_equals_unmerged_and_unmerge_restores(case):
    bare, layer, x = case
    shake(layer)
    unmerged = layer(x)
    layer.merge(safe_merge=True)
    assert layer.merged
    torch.testing.assert_close(layer(x), unmerged, rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.base_layer(x), unmerged, rtol=0, atol=1e-5)
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.weight, bare.weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(layer(x), unmerged, rtol=0, atol=1e-5)


def test_gradient_reaches_the_adapter_and_nothing_else(case):
    bare, layer, x = case
    shake(layer)
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == name.startswith("colora_"), name


def test_disabled_is_exactly_the_base_also_when_merged(case):
    bare, layer, x = case
    shake(layer)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), bare(x))
    layer.enable_adapters(True)
    layer.merge()
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(x), bare(x), rtol=0, atol=1e-5)
    assert not layer.merged


def test_state_dict_saves_and_reloads_under_another_seed(case):
    bare, layer, x = case
    shake(layer)
    torch.manual_seed(99)
    other = adapted(bare, rank=layer.rank["default"])
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("output_size", [(9, 7), (10, 8), (9, 8)])
def test_transposed_convolution_honours_output_size(output_size):
    bare = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1).requires_grad_(False)
    layer, x = adapted(bare), torch.randn(1, 4, 5, 4)
    output = layer(x, output_size=list(output_size))
    assert output.shape[2:] == output_size
    assert torch.equal(output, bare(x, list(output_size)))


def test_active_adapters_add():
    bare = nn.Conv2d(4, 6, 3)
    layer = adapted(bare, name="one", init_weights=False)
    layer.update_layer("two", 1000, 3.0, init_weights=False)
    x, delta = torch.randn(1, 4, 6, 6), {}
    for name in ("one", "two"):
        delta[name] = layer.get_delta_weight(name)
    layer.set_adapter(["one", "two"])
    both = run_with_weight(bare, bare.weight + delta["one"] + delta["two"], x)
    torch.testing.assert_close(layer(x), both, rtol=0, atol=1e-6)
    layer.merge()
    torch.testing.assert_close(layer(x), both, rtol=0, atol=1e-6)


def test_hooks_on_the_base_layer_still_run():
    bare = nn.Conv2d(4, 6, 3).requires_grad_(False)
    seen = []
    bare.register_forward_hook(lambda module, args, output: seen.append(output))
    layer = CoLoRALayer(bare)
    layer.update_layer("default", 1, 3.0, init_weights=False)
    layer.set_adapter("default")
    output = layer(torch.randn(1, 4, 6, 6))
    assert len(seen) == 1 and torch.equal(seen[0], output)


@pytest.mark.parametrize("rank", STORAGES.values(), ids=STORAGES)
def test_safe_merge_of_several_adapters_is_all_or_nothing(rank):
    layer = adapted(nn.Linear(6, 6), rank=rank, name="sound", init_weights=False)
    layer.update_layer("broken", 1, colora_alpha=3.0)
    with torch.no_grad():
        layer.colora_B["broken"][0, 0] = math.inf
    layer.set_adapter(["sound", "broken"])
    before = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="'broken'"):
        layer.merge(safe_merge=True)
    assert layer.merged_adapters == [] and torch.equal(layer.base_layer.weight, before)
    layer.merge(safe_merge=True, adapter_names=["sound"])
    assert layer.merged_adapters == ["sound"] and not torch.equal(layer.base_layer.weight, before)


def test_arguments_that_the_bare_layer_refuses_are_refused(case):
    bare, layer, x = case
    for module in (bare, layer):
        with pytest.raises(TypeError):
            module(x, None, 1)
        with pytest.raises(TypeError):
            module(x, scale=1.0)


@pytest.mark.parametrize("rank", [1, 2, 5, 1000])
@pytest.mark.parametrize("steps", [1, 20])
def test_adam_moves_the_output_alike_at_every_rank(rank, steps):
    """The scaling rule: each step moves the output by 0.8 colora_alpha * lr / sqrt(k) times the norm of the input;
    as A turns, factors have then moved it 1 + sqrt(k) * lr * steps times as far."""
    torch.manual_seed(0)
    d, k, learning_rate, alpha, moved = 32, 144, 1e-3, 16.0, []
    for _ in range(60):
        layer = adapted(nn.Linear(k, d, bias=False).requires_grad_(False), rank, colora_alpha=alpha)
        x = torch.randn(1, k)
        optimizer = torch.optim.Adam((p for p in layer.parameters() if p.requires_grad), lr=learning_rate)
        for _ in range(steps):
            optimizer.zero_grad()
            layer(x).sum().backward()  # whose gradient never turns
            optimizer.step()
        moved.append((layer.base_layer(x) - layer(x)).mean().item() / x.norm().item())
    expected = steps * math.sqrt(2 / math.pi) * alpha * learning_rate / math.sqrt(k)
    if rank < d:
        expected *= 1 + math.sqrt(k) * learning_rate * steps
    assert sum(moved) / len(moved) == pytest.approx(expected, rel=0.15)


def test_scaling_of_factors_and_dense():
    assert adapter_scaling(4, 100, 100, 16.0) == pytest.approx(16.0 / 4 / 10)
    assert adapter_scaling(50, 100, 100, 16.0) == pytest.approx(16.0 / 100)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_with_float32_adapter(dtype):
    bare = nn.Conv2d(4, 6, 3, padding=1).to(dtype).requires_grad_(False)
    layer, x = adapted(bare), torch.randn(1, 4, 6, 6).to(dtype)
    assert torch.equal(layer(x), bare(x))
    layer.float()
    layer.base_layer.to(dtype)  # as PEFT's autocast_adapter_dtype leaves it
    shake(layer)
    unmerged = layer(x)
    assert unmerged.dtype == dtype and layer.colora_A["default"].dtype == torch.float32
    layer.merge()
    assert torch.equal(layer(x), unmerged)


def test_autocast_builds_the_delta_in_full_precision():
    layer = adapted(nn.Conv2d(4, 6, 3))
    shake(layer)
    outside = layer.get_delta_weight("default")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.get_delta_weight("default"), outside)
        assert layer(torch.randn(1, 4, 6, 6)).dtype == torch.bfloat16


@pytest.mark.parametrize("rank", STORAGES.values(), ids=STORAGES)
def test_channels_last_keeps_the_layout_of_the_weight_and_the_output(rank):
    bare = nn.Conv2d(4, 6, 3, padding=1).requires_grad_(False)
    layer = adapted(bare, rank=rank)
    shake(layer)
    x = torch.randn(2, 4, 6, 6)
    expected = layer(x)
    layer.to(memory_format=torch.channels_last)
    assert layer.effective_weight().is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)


# --- which layers -----------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 4)
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), ScaledConv(4, 4, 1))
        self.attention = nn.MultiheadAttention(4, 2)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
        self.lazy = nn.LazyLinear(3)
        self.embedding = nn.Embedding(3, 4)
        self.up = nn.ConvTranspose2d(4, 4, 2)


def test_adaptable_layers_in_network_order_without_those_whose_weight_is_read_elsewhere():
    model = Mixed()
    layers = adaptable_layers(model)
    assert list(layers) == ["last", "first.0", "first.2", "up"]
    assert layers["first.0"] is model.first[0]
    assert "weight_norm" in why_not_adaptable(model.normed)
    assert "once" in why_not_adaptable(model.lazy)
    assert "Conv2d" in why_not_adaptable(model.embedding)


def test_adaptable_layers_names_an_adapted_layer_as_before():
    model = Mixed()
    bare = model.first[0]
    model.first[0] = CoLoRALayer(bare)
    assert list(adaptable_layers(model)) == ["last", "first.0", "first.2", "up"]
    assert adaptable_layers(model)["first.0"] is bare
    assert list(adaptable_layers(model.first[0])) == [""]


def test_weight_matrix_shape_follows_the_stored_layout():
    assert weight_matrix_shape(nn.Linear(10, 6)) == (6, 10)
    assert weight_matrix_shape(nn.Conv2d(8, 6, 3, groups=2)) == (6, 36)
    assert weight_matrix_shape(nn.ConvTranspose2d(8, 6, 2, groups=2)) == (8, 12)


@pytest.mark.parametrize("rank", STORAGES.values(), ids=STORAGES)
@pytest.mark.parametrize("kind", ["linear", "conv2d_reflect", "conv_transpose2d"])
def test_compiles_without_a_graph_break(kind, rank):
    torch._dynamo.reset()
    make, shape = CASES[kind]
    layer, x = adapted(make(), rank=rank, init_weights=False), torch.randn(shape)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=1e-5)
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=1e-5)


def test_a_computed_bias_is_used():
    bare = nn.Conv2d(4, 6, 3)
    nn.utils.parametrize.register_parametrization(bare, "bias", nn.Identity())
    layer, x = adapted(bare, init_weights=False), torch.randn(1, 4, 6, 6)
    expected = run_with_weight(nn.Conv2d(4, 6, 3, bias=False), layer.effective_weight(), x) + bare.bias[:, None, None]
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)


def test_a_replica_does_not_take_the_kept_weight_along():
    layer = adapted(nn.Conv2d(4, 6, 3), init_weights=False).requires_grad_(False).eval()
    layer(torch.randn(1, 4, 6, 6))
    assert layer._kept is not None and layer._replicate_for_data_parallel()._kept is None
