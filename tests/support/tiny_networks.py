"""Networks of a few hundred weights with every kind of layer that CoLoRA adapts, for the tests."""

import torch
from torch import nn

from colora_peft.models import (
    NAFNetConfig,
    NAFNetForImageRestoration,
    RestormerConfig,
    RestormerForImageRestoration,
)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.GroupNorm(2, 8)
        self.mix = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return x + self.mix(torch.relu(self.norm(self.conv(x))))


class Restorer(nn.Module):
    """A tiny restoration network with every kind of 2-D layer; (B, 3, 8, 8) to the same."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.blocks = nn.ModuleList([Block(), Block()])
        self.down = nn.Conv2d(8, 8, 2, stride=2)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.gate = nn.Linear(8, 8)
        self.head = nn.Conv2d(8, 3, 3, padding=2, dilation=2, bias=False)

    def forward(self, x):
        x = self.conv(x)
        for block in self.blocks:
            x = block(x)
        x = self.up(self.down(x))
        x = x * self.gate(x.mean((2, 3)))[:, :, None, None]
        return self.head(x)


class Sequence(nn.Module):
    """Linear, Conv1d and Conv3d; (B, 4, 5) to (B, 4, 5)."""

    def __init__(self):
        super().__init__()
        self.line = nn.Conv1d(4, 6, 3, padding=1)
        self.body = nn.Linear(5, 5)
        self.volume = nn.Conv3d(6, 4, 3, padding=1)

    def forward(self, x):
        x = self.body(torch.relu(self.line(x)))
        return self.volume(x[..., None, None])[..., 0, 0]


NETWORKS = {"restorer": (Restorer, (2, 3, 8, 8)), "sequence": (Sequence, (2, 4, 5))}


def network(name="restorer", seed=0):
    make, shape = NETWORKS[name]
    torch.manual_seed(seed)
    return make(), torch.rand(shape)


def trained(model, x, steps=3):
    """Takes a few steps so that no adapter is the identity."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    return model.eval()


TINY_NAFNET = {"width": 8, "encoder_blocks": (1, 1), "middle_blocks": 1, "decoder_blocks": (1, 1)}


def tiny_nafnet(seed=0, trained=True):
    """A tiny NAFNet; `trained` moves beta and gamma away from zero, at which every block is the identity."""
    torch.manual_seed(seed)
    model = NAFNetForImageRestoration(NAFNetConfig(**TINY_NAFNET))
    if trained:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("beta", "gamma", "norm1.weight", "norm2.bias")):
                    parameter.add_(torch.randn_like(parameter) / 2)
    return model.eval()


TINY_RESTORMER = {"width": 8, "num_blocks": (1, 1, 1, 1), "num_refinement_blocks": 1}


def tiny_restormer(seed=0, **settings):
    """A tiny Restormer whose temperatures and norms are not what they are at first."""
    torch.manual_seed(seed)
    model = RestormerForImageRestoration(RestormerConfig(**{**TINY_RESTORMER, **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or name.endswith("temperature"):
                parameter.add_(torch.randn_like(parameter) / 4)
    return model.eval()
