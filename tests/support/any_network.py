"""Helpers shared by tests: those of tuner/test_any_network.py."""

import torch
import torch.nn.functional as F
import transformers
from torch import nn


def swin2sr():
    """A tiny Swin2SR that keeps the size of the images, for windows of 4 x 4."""
    torch.manual_seed(0)
    settings = {"image_size": 8, "embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 4, "upscale": 1}
    return transformers.Swin2SRForImageSuperResolution(transformers.Swin2SRConfig(**settings)).eval()


class Plain(nn.Module):
    """Network of a package without any of Hugging Face in it: a tensor in, a tensor out, even sizes only."""

    needs_multiple_of = 2

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 12, 2, stride=2)

    def forward(self, x):
        return x + F.pixel_shuffle(self.down(F.gelu(self.conv(x))), 2)


def plain():
    torch.manual_seed(0)
    return Plain().eval()
