"""Helpers shared by tests: those of contribution/test_estimate.py."""

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from colora_peft import FaigSettings, estimate_contributions


def faig(model, end_state, batches, loss_fn, num_path_steps=FaigSettings.num_path_steps):
    settings = FaigSettings(num_path_steps)
    return estimate_contributions(model, batches, loss_fn, "faig", end_state=end_state, settings=settings)


def probe(model, batches, loss_fn, settings=None):
    return estimate_contributions(model, batches, loss_fn, "probe", settings=settings)


def mse(model, batch):
    x, target = batch
    return F.mse_loss(model(x), target)


def linear_pair(seed=0):
    """A linear model and end weights from another seed: with mse the loss is quadratic along the path."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 4), nn.Flatten())
    end = {name: value + torch.randn(value.shape) for name, value in model.state_dict().items()}
    batches = [(torch.randn(6, 5), torch.randn(6, 4)) for _ in range(3)]
    return model, end, batches


class SmallRestorer(nn.Module):
    """NAFNet in miniature: depthwise convolution, simple gate, channel attention, a residual on the input."""

    def __init__(self, with_batch_norm=False, dropout=0.0):
        super().__init__()
        self.intro = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8) if with_batch_norm else nn.GroupNorm(1, 8)
        self.expand = nn.Conv2d(8, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.attention = nn.Conv2d(8, 8, 1)
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Conv2d(8, 8, 1)
        self.unused = nn.Linear(4, 4)
        self.ending = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x):
        features = self.intro(x)
        left, right = self.depthwise(self.expand(self.norm(features))).chunk(2, dim=1)
        gated = left * right
        gated = gated * self.attention(gated.mean((2, 3), keepdim=True))
        return x + self.ending(features + self.project(self.dropout(gated)))


def restorer_task(num_batches=2, **kwargs):
    torch.manual_seed(0)
    model = SmallRestorer(**kwargs)
    targets = [torch.rand(2, 3, 16, 16) for _ in range(num_batches)]
    return model, [(0.3 + 0.5 * target, target) for target in targets]


def snapshot(model):
    """Everything about a model that an estimate may not change."""
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: parameter.data_ptr() for name, parameter in model.named_parameters()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {name: (id(p.grad), None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()},
        [module.training for module in model.modules()],
        torch.get_rng_state(),
        (random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]),
    )


def assert_same(before, after):
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())
    assert before[1:3] == after[1:3] and before[4] == after[4]
    assert torch.equal(before[5], after[5]) and before[6] == after[6]
    for name, (identity, grad) in before[3].items():
        assert after[3][name][0] == identity
        assert grad is None or torch.equal(grad, after[3][name][1])
