"""Layers that a network reads or writes by another way are found, by name, and the check leaves no trace."""

import copy

import pytest
import torch
from peft import get_peft_model
from support.loop import nafnet, plain
from support.reading_networks import Cached, Deployed, Reparametrized, Span, reading_network

from colora_peft import CoLoRAConfig
from colora_peft.training.merge_check import layers_not_as_merged, leave_wrong_layers_alone
from colora_peft.tuner.layer import adapted_layers

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def adapted(network, **settings):
    return get_peft_model(network, CoLoRAConfig(ranks=1, **settings))


def state(model):
    modes = [module.training for module in model.modules()]
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, modes, torch.get_rng_state()


@pytest.mark.parametrize("make", [nafnet, plain, *(lambda k=k: reading_network(k) for k in (Reparametrized, Cached))])
@pytest.mark.parametrize("bias", ["none", "all"])
def test_right_networks_pass_and_stay_as_they_are(make, bias):
    model = adapted(make(), bias=bias).train()
    before = copy.deepcopy(state(model))
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    assert layers_not_as_merged(model, IMAGES) == []
    after = state(model)
    assert before[0].keys() == after[0].keys() and before[1] == after[1] and torch.equal(before[2], after[2])
    assert all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())
    assert pointers == [parameter.data_ptr() for parameter in model.parameters()]
    assert trained == [parameter.requires_grad for parameter in model.parameters()]


@pytest.mark.parametrize("kind, wrong", [(Span, ["eval_conv"]), (Deployed, ["k1", "k3"])])
def test_layers_that_do_not_run_as_merged_are_named(kind, wrong):
    model = adapted(reading_network(kind))
    names = layers_not_as_merged(model, IMAGES)
    assert names == [f"{block}.{name}" for block in (1, 3) for name in wrong]
    left = adapted(reading_network(kind), exclude_modules=names)
    assert layers_not_as_merged(left, IMAGES) == []


def test_those_layers_are_left_alone_and_the_others_adapted():
    config = CoLoRAConfig(ranks=1)
    network = reading_network(Span)
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    model, left = leave_wrong_layers_alone(get_peft_model(network, CoLoRAConfig(ranks=1)), "colora", config, IMAGES)
    assert left == ["1.eval_conv", "3.eval_conv"]
    assert list(adapted_layers(model.get_base_model())) == ["0", "1.k1", "1.k3", "3.k1", "3.k3", "4"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.unload().state_dict().items())


def test_a_network_of_such_layers_alone_is_refused():
    network = torch.nn.Sequential(Deployed(3))
    model = get_peft_model(network, CoLoRAConfig(ranks=1))
    with pytest.raises(ValueError, match="weights of '?0.k1.*0.k3.* in a way that no adapter can follow"):
        leave_wrong_layers_alone(model, "colora", CoLoRAConfig(ranks=1), IMAGES)
