"""Averages of the weights: their recurrence, and that they never disturb the weights themselves."""

import pytest
import torch
from torch import nn

from colora_peft.training.ema import ExponentialMovingAverage


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1))
    model[0].requires_grad_(False)
    return model


def move(model, seed):
    """New trained weights, as a step would leave them; a copy of them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(one, other):
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_decay_rises_from_its_first_value_to_the_one_asked_for():
    ema = ExponentialMovingAverage(network(), decay=0.9)
    decays = [ema.decay_at(step) for step in range(1, 100)]
    assert decays[0] == 2 / 11 and decays == sorted(decays)
    assert decays[78] < 0.9 and decays[80:] == [0.9] * 19  # (1 + t) / (10 + t) reaches 0.9 at t = 80


def test_decay_zero_is_the_identity():
    model = network()
    ema = ExponentialMovingAverage(model, decay=0.0)
    for step in (1, 2, 3):
        weights = move(model, step)
        ema.update(step)
        assert_equal(ema.averages, weights)


def test_average_of_weights_that_stay_is_these_weights():
    model = network()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ema = ExponentialMovingAverage(model, decay=0.99)
    for step in range(1, 20):
        ema.update(step)
    assert_equal(ema.averages, start)


def test_averages_follow_the_recurrence():
    model = network()
    expected = {name: tensor.double() for name, tensor in model.state_dict().items()}
    ema = ExponentialMovingAverage(model, decay=0.5)
    for step, decay in ((1, 2 / 11), (2, 3 / 12), (3, 4 / 13), (30, 0.5)):
        weights = move(model, step)
        expected = {name: decay * expected[name] + (1 - decay) * weights[name].double() for name in expected}
        ema.update(step)
    for name, average in ema.averages.items():
        torch.testing.assert_close(average.double(), expected[name], rtol=0, atol=1e-6)


def test_only_trained_parameters_are_averaged():
    assert ExponentialMovingAverage(network(), 0.9).averages.keys() == {"1.weight", "1.bias", "2.weight", "2.bias"}


def test_applied_averages_leave_the_weights_bitwise_as_they_were():
    model = network()
    ema = ExponentialMovingAverage(model, decay=0.9)
    weights = move(model, 1)
    ema.update(1)
    with pytest.raises(KeyError), ema.applied():
        inside = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        raise KeyError
    assert_equal(ema.averages, inside)
    assert not torch.equal(inside["2.weight"], weights["2.weight"])
    assert_equal(weights, model.state_dict())


def test_copied_averages_are_the_weights_of_the_network():
    model = network()
    ema = ExponentialMovingAverage(model, decay=0.9)
    move(model, 1)
    ema.update(1)
    ema.copy_to_model()
    assert_equal(ema.averages, model.state_dict())
