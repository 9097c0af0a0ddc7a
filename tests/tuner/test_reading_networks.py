"""Networks that read weights without a call: adapted equals merged in every mode, and gradients reach the adapter."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.layer import shake
from support.reading_networks import Cached, Reparametrized, Span, reading_network
from torch import nn

from colora_peft import CoLoRAConfig
from colora_peft.tuner.layer import adapted_layers

X = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(5))


def adapted(kind, ranks=2, names=("default",), **settings):
    """The network with adapters of random deltas, of which the first is active."""
    bare = reading_network(kind)
    config = CoLoRAConfig(ranks=ranks, init_weights=False, **settings)
    model = get_peft_model(copy.deepcopy(bare), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, CoLoRAConfig(ranks=ranks, init_weights=False, **settings))
    for seed, layer in enumerate(adapted_layers(model).values()):
        shake(layer, seed)
    return bare, model.eval()


def merged(model):
    return copy.deepcopy(model).merge_and_unload()


same = {"rtol": 0, "atol": 1e-5}
kinds = pytest.mark.parametrize("kind", [Reparametrized, Cached])


@kinds
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("ranks", [1, 1000], ids=["factors", "dense"])
def test_adapted_equals_merged(kind, mode, ranks, grad_mode):
    bare, model = adapted(kind, ranks)
    expected, bare = getattr(merged(model), mode)(), getattr(bare, mode)()
    getattr(model, mode)()
    torch.testing.assert_close(model(X), expected(X), **same)
    assert (expected(X) - bare(X)).abs().max() > 0.01
    model.merge_adapter()
    getattr(model, mode)()
    torch.testing.assert_close(model(X), expected(X), **same)
    model.unmerge_adapter()
    getattr(model, mode)()
    torch.testing.assert_close(model(X), expected(X), **same)


@kinds
def test_training_and_evaluation_agree_inside(kind):
    """Without a bias in k1, both ways are the same function."""
    _, model = adapted(kind)
    torch.testing.assert_close(model.eval()(X), model.train()(X), **same)


def test_gradients_reach_the_adapter_through_the_weight_that_is_read():
    _, model = adapted(Reparametrized)
    model.eval()(X).square().mean().backward()
    read = {name: p for name, p in model.named_parameters() if "colora" in name}
    assert read and all(p.grad is not None and p.grad.any() for p in read.values())
    grads = {name: p.grad.clone() for name, p in read.items()}
    model.zero_grad()
    model.train()(X).square().mean().backward()  # the same function, by calls
    for name, parameter in read.items():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-3, atol=1e-5)


def test_switching_scaling_and_disabling_change_what_is_read(grad_mode):
    bare, model = adapted(Reparametrized, names=("rain", "haze"))
    expected = {}
    for name in ("rain", "haze"):
        model.set_adapter(name)
        expected[name] = merged(model)(X)
    for name in ("rain", "haze", "rain"):
        model.set_adapter(name)
        torch.testing.assert_close(model(X), expected[name], **same)
    with model.disable_adapter():
        assert torch.equal(model(X), bare(X))
    for layer in adapted_layers(model).values():
        layer.set_scale("rain", 0)
    torch.testing.assert_close(model(X), bare(X), **same)
    assert not torch.allclose(expected["rain"], expected["haze"], atol=1e-3)


def test_what_a_network_keeps_at_eval_follows_a_switch_at_the_next_eval():
    _, model = adapted(Cached, names=("rain", "haze"))
    for name in ("haze", "rain"):
        model.set_adapter(name)
        torch.testing.assert_close(model.eval()(X), merged(model).eval()(X), **same)


def test_loaded_is_what_was_saved(tmp_path):
    bare, model = adapted(Cached)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(bare, tmp_path).eval()(X), model(X))


def test_span_is_right_where_the_layer_that_it_writes_is_left_alone(grad_mode):
    _, model = adapted(Span, exclude_modules=["eval_conv"])
    torch.testing.assert_close(model(X), merged(model)(X), **same)


def test_a_batch_of_several_adapters_is_refused_and_one_of_one_adapter_runs():
    _, model = adapted(Reparametrized, names=("rain", "haze"))
    with pytest.raises(NotImplementedError, match="reads the weight of an adapted layer"):
        model(X, adapter_names=["rain", "haze"])
    out = model(X, adapter_names=["haze", "haze"])
    model.set_adapter("haze")
    torch.testing.assert_close(out, model(X), **same)


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Conv2d(4, 3, 3, padding=1), nn.ConvTranspose2d(4, 3, 2)])
def test_the_weight_is_the_parameter_of_the_base_where_nothing_is_added(layer):
    model = get_peft_model(nn.Sequential(copy.deepcopy(layer)), CoLoRAConfig(ranks=1, init_weights=False))
    wrapped = model.get_base_model()[0]
    assert not torch.equal(wrapped.weight, wrapped.base_layer.weight)
    torch.testing.assert_close(wrapped.weight, wrapped.effective_weight(), rtol=0, atol=0)
    with model.disable_adapter():
        assert wrapped.weight is wrapped.base_layer.weight
    model.merge_adapter()
    assert wrapped.weight is wrapped.base_layer.weight
    assert wrapped.bias is wrapped.base_layer.bias
