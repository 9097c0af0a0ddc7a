"""Adapted layers that are called from several threads at once."""

import copy
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import get_peft_model
from torch import nn

from colora_peft import CoLoRAConfig


class Slow(nn.Conv2d):
    """A convolution with a forward pass of its own, which lets other threads go first."""

    def forward(self, x):
        weight = self.weight
        time.sleep(0.002)
        return self._conv_forward(x, (weight + self.weight) / 2, self.bias)


def hooked():
    layer = nn.Conv2d(3, 3, 3)
    layer.register_forward_pre_hook(lambda *_: time.sleep(0.002))
    return layer


@pytest.mark.parametrize("make", [lambda: Slow(3, 3, 3), hooked], ids=["subclass", "hook"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_a_layer_that_runs_with_a_weight_in_place_of_its_own_has_it_back(make, training):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(make()), CoLoRAConfig(ranks=2, init_weights=False)).train(training)
    before = copy.deepcopy(model.state_dict())
    inputs = torch.rand(16, 1, 3, 6, 6)
    expected = [model(x).detach() for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda x: model(x).detach(), inputs))
    assert all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_merged_layer_is_unmerged_once(monkeypatch):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Conv2d(3, 3, 3)), CoLoRAConfig(ranks=2, init_weights=False)).eval()
    layer, x = model.get_base_model()[0], torch.rand(1, 3, 6, 6)
    with model.disable_adapter():
        expected = model(x)
    delta = type(layer).get_delta_weight
    monkeypatch.setattr(type(layer), "get_delta_weight", lambda *args: time.sleep(0.01) or delta(*args))
    model.merge_adapter()
    with model.disable_adapter(), ThreadPoolExecutor(4) as pool:
        for output in pool.map(model, [x] * 4):
            torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    assert not layer.merged_adapters
