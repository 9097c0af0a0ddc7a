"""NAFNet as a Hugging Face model.

Paper: Chen, Chu, Zhang, Sun, "Simple Baselines for Image Restoration", ECCV 2022, arXiv 2204.04676, the
sections that build its baseline and then take out the nonlinear activations. Parameter names follow the official state
dict (github.com/megvii-research/NAFNet, MIT), so that its weights load strictly; the code here is our own.

Images are float RGB (B, C, H, W) in [0, 1]. The network predicts a residual on its input; its output is not clamped.
`model.to(memory_format=torch.channels_last)` spares the layer norms, which run over the last axis, a copy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from colora_peft.models.backbone import RestorationBackbone

from .configuration_nafnet import NAFNetConfig


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation over the channels of each pixel: (B, C, H, W) to the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def simple_gate(x: Tensor) -> Tensor:
    """Product of the two halves of the channels, the only nonlinearity: (B, 2C, H, W) to (B, C, H, W)."""
    left, right = x.chunk(2, dim=1)
    return left * right


class NAFBlock(GradientCheckpointingLayer):
    """One nonlinear-activation-free block: (B, C, H, W) to the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        doubled = 2 * channels
        self.conv1 = nn.Conv2d(channels, doubled, kernel_size=1)
        self.conv2 = nn.Conv2d(doubled, doubled, kernel_size=3, padding=1, groups=doubled)
        # The paper's simplified channel attention. Index 0 pools over the whole image and has no parameters.
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, kernel_size=1))
        self.conv3 = nn.Conv2d(channels, channels, kernel_size=1)
        self.conv4 = nn.Conv2d(channels, doubled, kernel_size=1)
        self.conv5 = nn.Conv2d(channels, channels, kernel_size=1)
        self.norm1 = LayerNorm2d(channels, eps=1e-6)
        self.norm2 = LayerNorm2d(channels, eps=1e-6)
        self.beta = nn.Parameter(torch.empty(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.empty(1, channels, 1, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Makes the block the identity, which it is at first."""
        nn.init.zeros_(self.beta)
        nn.init.zeros_(self.gamma)

    def forward(self, x: Tensor) -> Tensor:
        branch = simple_gate(self.conv2(self.conv1(self.norm1(x))))
        branch = self.conv3(branch * self.sca(branch))
        x = x + branch * self.beta
        branch = self.conv5(simple_gate(self.conv4(self.norm2(x))))
        return x + branch * self.gamma


def stage(channels: int, num_blocks: int) -> nn.Sequential:
    return nn.Sequential(*[NAFBlock(channels) for _ in range(num_blocks)])


class NAFNetForImageRestoration(RestorationBackbone):
    """NAFNet that maps degraded images to restored ones of the same size."""

    config_class = NAFNetConfig
    base_model_prefix = "nafnet"
    _no_split_modules = ["NAFBlock"]
    decoder_modules = ("ups", "decoders", "ending")

    def __init__(self, config: NAFNetConfig) -> None:
        super().__init__(config)
        channels = config.width
        self.intro = nn.Conv2d(config.num_channels, channels, kernel_size=3, padding=1)
        # Registered in the order in which they run: tables and figures list layers in this order.
        self.encoders, self.downs = nn.ModuleList(), nn.ModuleList()
        for num_blocks in config.encoder_blocks:
            self.encoders.append(stage(channels, num_blocks))
            self.downs.append(nn.Conv2d(channels, 2 * channels, kernel_size=2, stride=2))
            channels *= 2
        self.middle_blks = stage(channels, config.middle_blocks)
        self.ups, self.decoders = nn.ModuleList(), nn.ModuleList()
        for num_blocks in config.decoder_blocks:
            expand = nn.Conv2d(channels, 2 * channels, kernel_size=1, bias=False)
            self.ups.append(nn.Sequential(expand, nn.PixelShuffle(2)))
            channels //= 2
            self.decoders.append(stage(channels, num_blocks))
        self.ending = nn.Conv2d(channels, config.num_channels, kernel_size=3, padding=1)
        self.post_init()

    def pad(self, images: Tensor) -> Tensor:
        """Images with zeros below and to the right, as in the official code: its weights were tested that way."""
        height, width = images.shape[-2:]
        multiple = self.config.pads_to_multiple
        return F.pad(images, (0, -width % multiple, 0, -height % multiple))

    def restore(self, images: Tensor) -> Tensor:
        x = self.intro(images)
        skips = []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            x = encoder(x)
            skips.append(x)
            x = down(x)
        x = self.middle_blks(x)
        for up, skip, decoder in zip(self.ups, reversed(skips), self.decoders, strict=True):
            x = decoder(up(x) + skip)
        return self.ending(x) + images
