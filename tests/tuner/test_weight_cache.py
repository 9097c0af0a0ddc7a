"""The effective weight that an adapted layer keeps between calls at inference: when, and that it is never stale."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import save as save_safetensors
from torch import nn

from colora_peft.tuner.functional import run_with_weight
from colora_peft.tuner.layer import CoLoRALayer


def adapted(bare, rank=1, name="default", **settings):
    layer = CoLoRALayer(copy.deepcopy(bare))
    layer.update_layer(name, rank, colora_alpha=3.0, **settings)
    layer.set_adapter(name)
    return layer


@pytest.fixture
def frozen():
    """A layer as PeftModel.from_pretrained leaves it: nothing requires a gradient, evaluation mode."""
    layer = adapted(nn.Conv2d(4, 6, 3, padding=1), init_weights=False).requires_grad_(False).eval()
    layer.update_layer("other", 1000, 3.0, init_weights=False)
    return layer.requires_grad_(False)


def _step(layer):
    layer.colora_B["default"].grad = torch.ones_like(layer.colora_B["default"])
    torch.optim.AdamW([layer.colora_B["default"]], lr=0.1, foreach=True).step()


CHANGES = {
    "load_state_dict": lambda layer: layer.load_state_dict({k: v + 0.1 for k, v in layer.state_dict().items()}),
    "optimizer": _step,
    "set_adapter": lambda layer: layer.set_adapter("other", inference_mode=True),
    "both_adapters": lambda layer: layer.set_adapter(["default", "other"], inference_mode=True),
    "scaling": lambda layer: layer.scaling.update(default=7.0),
    "update_layer": lambda layer: layer.update_layer("default", 2, 3.0, init_weights=False),
    "new_data": lambda layer: setattr(layer.base_layer.weight, "data", torch.randn(6, 4, 3, 3)),
    "merge_other": lambda layer: (layer.merge(adapter_names=["other"]), layer.merged_adapters.clear()),
    "double": lambda layer: layer.double().float(),
    "data_then_eval": lambda layer: (layer.base_layer.weight.data.add_(1), layer.eval()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_kept_weight_is_never_stale(frozen, change, trainable):
    if trainable:
        frozen.set_adapter("default")  # as PeftModel.set_adapter leaves it
    x = torch.randn(1, 4, 6, 6)
    with torch.no_grad():
        before, kept = frozen(x), frozen._kept
        assert torch.equal(frozen(x), before) and frozen._kept is kept and kept is not None
        change(frozen)
        expected = run_with_weight(frozen.base_layer, frozen.effective_weight(), x)
        assert torch.equal(frozen(x), expected)
        assert not torch.allclose(before, expected, atol=1e-4) or change is CHANGES["double"]


@pytest.mark.parametrize("name", ["default", "other"])
def test_uncounted_writes_into_a_trainable_adapter_are_seen(frozen, name):
    """Averaged weights are swapped in through `.data`, which no version counts, and often without eval()."""
    frozen.set_adapter(name)
    x = torch.randn(1, 4, 6, 6)
    with torch.no_grad():
        before = frozen(x)
        for container in (frozen.colora_B, frozen.colora_dense):
            if name in container:
                container[name].data.add_(1.0)
        assert torch.equal(frozen(x), run_with_weight(frozen.base_layer, frozen.effective_weight(), x))
        assert not torch.allclose(frozen(x), before, atol=1e-4)


def test_weight_is_not_kept_where_gradients_flow_into_it(frozen):
    x = torch.randn(1, 4, 6, 6)
    frozen.train()(x)
    assert frozen._kept is None
    frozen.eval().set_adapter("default")
    with torch.no_grad():
        frozen(x)
        assert frozen._kept is not None
    frozen(x).sum().backward()
    assert frozen.colora_B["default"].grad.abs().sum() > 0
    with torch.no_grad():
        frozen.base_layer.weight.requires_grad_(True)  # its writes may be uncounted, too, and copying it is dear
        frozen(x)
        assert frozen._kept is None


@pytest.mark.parametrize("state", ["disabled", "merged"])
def test_kept_weight_is_not_used_while_disabled_or_merged(frozen, state):
    x = torch.randn(1, 4, 6, 6)
    adapted_output = frozen(x)
    if state == "disabled":
        frozen.enable_adapters(False)
        assert torch.equal(frozen(x), frozen.base_layer(x))
        frozen.enable_adapters(True)
    else:
        frozen.merge()
        torch.testing.assert_close(frozen(x), adapted_output, rtol=0, atol=1e-5)
        frozen.unmerge()
    torch.testing.assert_close(frozen(x), adapted_output, rtol=0, atol=1e-5)


def test_hook_that_comes_after_the_weight_was_kept_runs(frozen):
    x, seen = torch.randn(1, 4, 6, 6), []
    frozen(x)
    frozen.base_layer.register_forward_hook(lambda module, args, output: seen.append(output))
    output = frozen(x)
    assert len(seen) == 1 and torch.equal(seen[0], output)


def test_kept_weight_built_under_inference_mode_lets_gradients_through_later(frozen):
    x = torch.randn(1, 4, 6, 6)
    with torch.inference_mode():
        frozen(x)
    assert frozen._kept is not None
    x.requires_grad_(True)
    frozen(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_kept_weight_is_neither_copied_nor_saved(frozen):
    names = set(frozen.state_dict())
    frozen(torch.randn(1, 4, 6, 6))
    assert frozen._kept is not None
    assert set(frozen.state_dict()) == names
    assert copy.deepcopy(frozen)._kept is None
    assert pickle.loads(pickle.dumps(frozen))._kept is None
    assert len(save_safetensors(frozen.state_dict())) > 0


def test_weights_made_under_inference_mode_are_not_kept():
    with torch.inference_mode():
        layer = adapted(nn.Linear(4, 4), init_weights=False).requires_grad_(False).eval()
        x = torch.randn(2, 4)
        assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.effective_weight(), layer.base_layer.bias))
        assert layer._kept is None
