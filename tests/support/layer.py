"""Helpers shared by tests: those of tuner/test_layer.py."""

import copy

import torch
from torch import nn

from colora_peft.tuner.layer import CoLoRALayer


class ScaledConv(nn.Conv2d):
    """A subclass with a forward pass of its own, which must not be lost."""

    def forward(self, x):
        return 2 * super().forward(x)


CASES = {
    "linear": (lambda: nn.Linear(10, 6), (2, 5, 10)),
    "linear_no_bias": (lambda: nn.Linear(10, 6, bias=False), (2, 10)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 9, 8)),
    "conv2d_1x1": (lambda: nn.Conv2d(8, 6, 1, bias=False), (2, 8, 5, 4)),
    "conv2d_grouped": (lambda: nn.Conv2d(8, 6, 3, groups=2, padding=1), (2, 8, 7, 6)),
    "conv2d_depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, padding=1), (2, 6, 7, 6)),
    "conv2d_strided": (lambda: nn.Conv2d(4, 6, 3, stride=2), (2, 4, 9, 8)),
    "conv2d_dilated": (lambda: nn.Conv2d(4, 6, 3, dilation=2), (2, 4, 9, 8)),
    "conv2d_same": (lambda: nn.Conv2d(4, 6, 4, padding="same"), (2, 4, 9, 8)),
    "conv2d_reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 9, 8)),
    "conv2d_circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 9, 8)),
    "conv2d_subclass": (lambda: ScaledConv(4, 6, 3), (2, 4, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(3, 5, 3, padding=1), (2, 3, 5, 4, 6)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(6, 4, 2, stride=2), (2, 6, 5, 4)),
    "conv_transpose2d_grouped": (
        lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=1),
        (2, 6, 5, 4),
    ),
}


STORAGES = {"factors": 1, "dense": 1000}


def make_case(name, storage):
    """(bare layer, the same layer adapted and active, input); the adapter is the identity."""
    make, shape = CASES[name]
    torch.manual_seed(0)
    bare = make().requires_grad_(False)
    layer = adapted(bare, rank=STORAGES[storage])
    assert len(layer.colora_dense) == (storage == "dense")
    return bare, layer, torch.randn(shape)


def adapted(bare, rank=1, name="default", colora_alpha=16.0, **settings):
    layer = CoLoRALayer(copy.deepcopy(bare))
    layer.update_layer(name, rank, colora_alpha, **settings)
    layer.set_adapter(name)
    return layer


def shake(layer, seed=1):
    """Gives every adapter parameter another random value, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith("colora_"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
