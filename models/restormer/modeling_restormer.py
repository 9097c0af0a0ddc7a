"""Restormer as a Hugging Face model.

Paper: Zamir, Arora, Khan, Hayat, Khan, Yang, "Restormer: Efficient Transformer for High-Resolution Image Restoration",
CVPR 2022, arXiv 2111.09881. Written from the paper; parameter names follow the official state dict, so that its
weights load strictly.

Images are float (B, C, H, W) in [0, 1]. The network predicts a residual on its input; its output is not clamped.
Inside, features lie in memory as channels_last, whatever the image's format: nothing is copied between convolutions,
norms and attention.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from colora_peft.models.backbone import RestorationBackbone
from colora_peft.utils import pad_to_multiple

from .attention_restormer import ChannelAttention
from .configuration_restormer import RestormerConfig


class LayerNorm(nn.Module):
    """Layer normalisation over the channels of each pixel: (B, C, H, W) to the same shape.

    Without bias the variance is that about the mean, but the mean itself stays in.
    """

    def __init__(self, channels: int, bias: bool, eps: float = 1e-5) -> None:
        super().__init__()
        self.body = nn.LayerNorm(channels, eps, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        if self.body.bias is None:
            x = x * (x.var(dim=-1, keepdim=True, correction=0) + self.body.eps).rsqrt() * self.body.weight
        else:
            x = self.body(x)
        return x.permute(0, 3, 1, 2)


class GatedGelu(torch.autograd.Function):
    """Product of gelu(left) and right, the two halves of the channels: (B, 2C, H, W) to (B, C, H, W).

    Keeps its input alone for the backward pass, which the convolution before has made anyway; autograd would keep
    gelu(left), too.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        return F.gelu(left) * right

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        left, right = ctx.saved_tensors[0].chunk(2, dim=1)
        return torch.cat([torch.ops.aten.gelu_backward(gradient * right, left), gradient * F.gelu(left)], dim=1)


class GatedFeedForward(nn.Module):
    """The paper's gated-Dconv feed-forward network: (B, C, H, W) to the same shape."""

    def __init__(self, channels: int, config: RestormerConfig) -> None:
        super().__init__()
        hidden = int(channels * config.ffn_expansion)
        self.project_in = nn.Conv2d(channels, 2 * hidden, kernel_size=1, bias=config.bias)
        self.dwconv = nn.Conv2d(2 * hidden, 2 * hidden, kernel_size=3, padding=1, groups=2 * hidden, bias=config.bias)
        self.project_out = nn.Conv2d(hidden, channels, kernel_size=1, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.project_out(GatedGelu.apply(self.dwconv(self.project_in(x))))


class RestormerBlock(GradientCheckpointingLayer):
    """One transformer block: (B, C, H, W) to the same shape."""

    def __init__(self, channels: int, level: int, config: RestormerConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(channels, config.norm_bias)
        self.attn = ChannelAttention(channels, config.num_heads[level - 1], config.bias)
        self.norm2 = LayerNorm(channels, config.norm_bias)
        self.ffn = GatedFeedForward(channels, config)

    def forward(self, x: Tensor) -> Tensor:
        # Already so, except after the resampling of some devices.
        x = x.contiguous(memory_format=torch.channels_last)
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


def conv3x3(channels: int, new_channels: int, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(channels, new_channels, kernel_size=3, padding=1, bias=bias)


def resampling(channels: int, new_channels: int, rearrange: nn.Module) -> nn.Sequential:
    """Step to another resolution, under the names of the official state dict: (B, C, H, W) to (B, 2 C, H/2, W/2), or
    to (B, C/2, 2 H, 2 W)."""
    return nn.Sequential(OrderedDict(body=nn.Sequential(conv3x3(channels, new_channels), rearrange)))


class RestormerForImageRestoration(RestorationBackbone):
    """Restormer that maps degraded images to restored ones of the same size.

    Images of a dual-pixel camera have the channels of the left view, then those of the right one.
    """

    config_class = RestormerConfig
    base_model_prefix = "restormer"
    _no_split_modules = ["RestormerBlock"]
    decoder_modules = (
        "up4_3", "reduce_chan_level3", "decoder_level3", "up3_2", "reduce_chan_level2", "decoder_level2", "up2_1",
        "decoder_level1", "refinement", "skip_conv", "output",
    )  # fmt: skip

    def __init__(self, config: RestormerConfig) -> None:
        super().__init__(config)
        c1, c2, c3, c4 = (config.width * 2**level for level in range(4))

        def stage(channels: int, level: int, num_blocks: int | None = None) -> nn.Sequential:
            count = config.num_blocks[level - 1] if num_blocks is None else num_blocks
            return nn.Sequential(*[RestormerBlock(channels, level, config) for _ in range(count)])

        # Registered in the order in which they run: tables and figures list layers in this order.
        self.patch_embed = nn.Sequential(OrderedDict(proj=conv3x3(config.num_channels, c1)))
        self.encoder_level1 = stage(c1, 1)
        self.down1_2 = resampling(c1, c1 // 2, nn.PixelUnshuffle(2))
        self.encoder_level2 = stage(c2, 2)
        self.down2_3 = resampling(c2, c2 // 2, nn.PixelUnshuffle(2))
        self.encoder_level3 = stage(c3, 3)
        self.down3_4 = resampling(c3, c3 // 2, nn.PixelUnshuffle(2))
        self.latent = stage(c4, 4)
        self.up4_3 = resampling(c4, 2 * c4, nn.PixelShuffle(2))
        self.reduce_chan_level3 = nn.Conv2d(2 * c3, c3, kernel_size=1, bias=config.bias)
        self.decoder_level3 = stage(c3, 3)
        self.up3_2 = resampling(c3, 2 * c3, nn.PixelShuffle(2))
        self.reduce_chan_level2 = nn.Conv2d(2 * c2, c2, kernel_size=1, bias=config.bias)
        self.decoder_level2 = stage(c2, 2)
        self.up2_1 = resampling(c2, 2 * c2, nn.PixelShuffle(2))
        # At full resolution the skip connection's channels are kept, not mixed down.
        self.decoder_level1 = stage(2 * c1, 1)
        self.refinement = stage(2 * c1, 1, config.num_refinement_blocks)
        self.skip_conv = nn.Conv2d(c1, 2 * c1, kernel_size=1, bias=config.bias) if config.dual_pixel else None
        self.output = conv3x3(2 * c1, config.num_output_channels, config.bias)
        self.post_init()

    def pad(self, images: Tensor) -> Tensor:
        """Images mirrored below and to the right, as in the official evaluation of the published weights."""
        return pad_to_multiple(images, self.config.pads_to_multiple)

    def restore(self, images: Tensor) -> Tensor:
        first = self.patch_embed(images)
        skip1 = self.encoder_level1(first)
        skip2 = self.encoder_level2(self.down1_2(skip1))
        skip3 = self.encoder_level3(self.down2_3(skip2))
        x = self.latent(self.down3_4(skip3))
        x = self.decoder_level3(self.reduce_chan_level3(torch.cat([self.up4_3(x), skip3], dim=1)))
        x = self.decoder_level2(self.reduce_chan_level2(torch.cat([self.up3_2(x), skip2], dim=1)))
        x = self.refinement(self.decoder_level1(torch.cat([self.up2_1(x), skip1], dim=1)))
        return self.output(x) + images if self.skip_conv is None else self.output(x + self.skip_conv(first))
