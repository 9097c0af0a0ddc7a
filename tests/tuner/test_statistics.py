"""Running statistics of the base stay while adapters train, however training mode comes, so saved equals trained."""

import copy
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from colora_peft import CoLoRAConfig


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.InstanceNorm2d(8, track_running_stats=True), nn.Dropout(0.1)
    ).eval()


def trained(model, network=None, steps=5):
    """`model` after some steps, on inputs whose statistics are far from those of the base."""
    (network or model).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
    for step in range(steps):
        x = 3 + torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


X = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("entry", ["model", "base", "layer"])
def test_loaded_is_what_was_trained(tmp_path, entry):
    bare = network()
    model = get_peft_model(copy.deepcopy(bare), CoLoRAConfig(ranks=2))
    start = {"model": model, "base": model.get_base_model(), "layer": None}[entry]
    if start is None:  # whoever puts the modules into training mode one by one
        for module in model.modules():
            module.training = True
        start = nn.Identity()
    trained(model, start)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path).eval()
    assert torch.equal(loaded(X), model(X)) and not torch.allclose(model(X), bare(X), atol=1e-3)
    for name, buffer in bare.named_buffers():
        assert torch.equal(model.get_base_model().get_buffer(name), buffer), name


def test_training_mode_is_left_before_the_first_call_and_dropout_keeps_it():
    model = get_peft_model(network(), CoLoRAConfig(ranks=2)).train()
    assert [module.training for module in model.get_base_model()] == [True, False, False, True]


def test_what_is_trained_whole_moves_its_statistics_and_saves_them(tmp_path):
    bare = network()
    config = CoLoRAConfig(ranks={"0": 2}, modules_to_save=["1"])
    model = trained(get_peft_model(copy.deepcopy(bare), config))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path).eval()
    copy_of_norm = loaded.get_base_model()[1].modules_to_save["default"]
    assert copy_of_norm.running_mean.sub(bare[1].running_mean).abs().max() > 0.1
    torch.testing.assert_close(loaded(X), model(X), rtol=0, atol=1e-6)


def test_who_trains_the_base_itself_moves_its_statistics():
    model = get_peft_model(network(), CoLoRAConfig(ranks=2))
    model.get_base_model().requires_grad_(True)
    assert not torch.equal(trained(model).get_base_model()[1].running_mean, network()[1].running_mean)


def test_a_network_that_carries_the_adapter_itself_is_frozen_too():
    """As by add_adapter of transformers: there is no PeftModel to put into training mode."""
    bare = network()
    model = inject_adapter_in_model(CoLoRAConfig(ranks=2), copy.deepcopy(bare))
    trained(model)
    for name, buffer in bare.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name


@pytest.mark.parametrize("leave", ["unload", "merge_and_unload"])
def test_the_network_is_free_again_without_adapters(leave):
    model = get_peft_model(network(), CoLoRAConfig(ranks=2))
    plain = getattr(model, leave)()
    assert not any(module._forward_pre_hooks for module in plain.modules())
    assert plain.train()[1].training


def test_copies_and_pickles_stay_frozen():
    model = get_peft_model(network(), CoLoRAConfig(ranks=2))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        trained(twin, twin.get_base_model())
        assert torch.equal(twin.get_base_model()[1].running_mean, network()[1].running_mean)
