"""Networks that read the weights of their layers without calling them, as re-parametrised convolutions do."""

import torch
import torch.nn.functional as F
from torch import nn


class Reparametrized(nn.Module):
    """Trains k3(k1(x)) and evaluates one convolution with the product of both, as RepVGG's relatives do."""

    def __init__(self, channels=6):
        super().__init__()
        self.k1 = nn.Conv2d(channels, 2 * channels, 1, bias=False)
        self.k3 = nn.Conv2d(2 * channels, channels, 3, padding=1)

    def product(self):
        return torch.einsum("omhw,mi->oihw", self.k3.weight, self.k1.weight[:, :, 0, 0])

    def forward(self, x):
        if self.training:
            return x + self.k3(self.k1(x))
        return x + F.conv2d(x, self.product(), self.k3.bias, self.k3.stride, self.k3.padding)


class Cached(Reparametrized):
    """Computes the product once, whenever it enters evaluation mode."""

    def train(self, mode=True):
        super().train(mode)
        self.cache = None if mode else self.product().detach()
        return self

    def forward(self, x):
        return super().forward(x) if self.training else x + F.conv2d(x, self.cache, self.k3.bias, padding=1)


class Span(Reparametrized):
    """Writes the product into a layer of its own before each call, as SPAN's Conv3XC does."""

    def __init__(self, channels=6):
        super().__init__(channels)
        self.eval_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.eval_conv.requires_grad_(False)

    def forward(self, x):
        if self.training:
            return super().forward(x)
        self.eval_conv.weight.data = self.product().data.clone().detach()
        self.eval_conv.bias.data = self.k3.bias.data.clone().detach()
        return x + self.eval_conv(x)


class Deployed(Reparametrized):
    """Reads the parameters by their names in the state dict, which an adapter changes nothing of."""

    def product(self):
        k1, k3 = (getattr(layer, "base_layer", layer)._parameters["weight"] for layer in (self.k1, self.k3))
        return torch.einsum("omhw,mi->oihw", k3, k1[:, :, 0, 0])


def reading_network(kind):
    """Two blocks of a kind between convolutions, in evaluation mode."""
    torch.manual_seed(0)
    ends = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 3, 3, padding=1)
    return nn.Sequential(ends[0], kind(), nn.GELU(), kind(), ends[1]).eval()
