"""Restormer as a Hugging Face model.

Paper: Zamir, Arora, Khan, Hayat, Khan, Yang, "Restormer: Efficient Transformer for High-Resolution Image Restoration",
CVPR 2022, arXiv 2111.09881. Written from the paper; parameter names follow the official state dict, so that its
weights load strictly.

Images are float (B, C, H, W) in [0, 1]. The network predicts a residual on its input; its output is not clamped.
Inside, features lie in memory as channels_last, whatever the image's format: nothing is copied between convolutions,
norms and attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..backbone import RestorationBackbone
from .attention_restormer import ChannelAttention
from .configuration_restormer import RestormerConfig


class LayerNorm(nn.Module):
    """Layer normalisation over the channels of each pixel: (B, C, H, W) to the same shape.

    Without bias the variance is that about the mean, but the mean itself stays in.
    """

    def __init__(self, channels: int, bias: bool, eps: float = 1e-5) -> None:
        super().__init__()
        # The parameters alone: official state dicts name them `body.weight` and `body.bias`.
        self.body = nn.Module()
        self.body.weight = nn.Parameter(torch.empty(channels))
        self.body.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.body.weight)
        if self.body.bias is not None:
            nn.init.zeros_(self.body.bias)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.body.weight, self.body.bias
        channels_last = x.permute(0, 2, 3, 1)
        if bias is None:
            variance = channels_last.var(dim=-1, keepdim=True, correction=0)
            normed = channels_last * (variance + self.eps).rsqrt() * weight
        else:
            normed = F.layer_norm(channels_last, weight.shape, weight, bias, self.eps)
        return normed.permute(0, 3, 1, 2)


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

    def __init__(self, channels: int, heads: int, config: RestormerConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(channels, config.norm_bias)
        self.attn = ChannelAttention(channels, heads, config.bias)
        self.norm2 = LayerNorm(channels, config.norm_bias)
        self.ffn = GatedFeedForward(channels, config)

    def forward(self, x: Tensor) -> Tensor:
        # Already so, except after the resampling of some devices.
        x = x.contiguous(memory_format=torch.channels_last)
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class PatchEmbedding(nn.Module):
    """First features of each pixel: (B, C, H, W) to (B, width, H, W)."""

    def __init__(self, config: RestormerConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.num_channels, config.width, kernel_size=3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Resampling(nn.Module):
    """Step to twice the channels at half the resolution, or back: a 3 x 3 convolution and a reordering of pixels."""

    def __init__(self, channels: int, down: bool) -> None:
        super().__init__()
        new_channels, rearrange = (channels // 2, nn.PixelUnshuffle(2)) if down else (channels * 2, nn.PixelShuffle(2))
        self.body = nn.Sequential(nn.Conv2d(channels, new_channels, kernel_size=3, padding=1, bias=False), rearrange)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def pad_by_reflection(images: Tensor, multiple: int) -> Tensor:
    """Pad (B, C, H, W) below and to the right up to a multiple, by mirroring about the last row and column.

    Images smaller than their padding are mirrored back and forth, where `F.pad` would refuse.
    """
    height, width = images.shape[-2:]
    if min(height, width) >= multiple:
        return F.pad(images, (0, -width % multiple, 0, -height % multiple), mode="reflect")
    for dim in (2, 3):
        size = images.shape[dim]
        last = size - 1
        # Back and forth is 0 1 ... last ... 1 | 0 1 ...: a period of 2 * last pixels, of one pixel 0 0 0 ...
        index = torch.arange(size + -size % multiple, device=images.device) % max(2 * last, 1)
        images = images.index_select(dim, last - (last - index).abs())
    return images


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
            heads = config.num_heads[level - 1]
            return nn.Sequential(*[RestormerBlock(channels, heads, config) for _ in range(count)])

        # Registered in the order in which they run: tables and figures list layers in this order.
        self.patch_embed = PatchEmbedding(config)
        self.encoder_level1 = stage(c1, 1)
        self.down1_2 = Resampling(c1, down=True)
        self.encoder_level2 = stage(c2, 2)
        self.down2_3 = Resampling(c2, down=True)
        self.encoder_level3 = stage(c3, 3)
        self.down3_4 = Resampling(c3, down=True)
        self.latent = stage(c4, 4)
        self.up4_3 = Resampling(c4, down=False)
        self.reduce_chan_level3 = nn.Conv2d(2 * c3, c3, kernel_size=1, bias=config.bias)
        self.decoder_level3 = stage(c3, 3)
        self.up3_2 = Resampling(c3, down=False)
        self.reduce_chan_level2 = nn.Conv2d(2 * c2, c2, kernel_size=1, bias=config.bias)
        self.decoder_level2 = stage(c2, 2)
        self.up2_1 = Resampling(c2, down=False)
        # At full resolution the skip connection's channels are kept, not mixed down.
        self.decoder_level1 = stage(2 * c1, 1)
        self.refinement = stage(2 * c1, 1, config.num_refinement_blocks)
        self.skip_conv = nn.Conv2d(c1, 2 * c1, kernel_size=1, bias=config.bias) if config.dual_pixel else None
        self.output = nn.Conv2d(2 * c1, config.num_output_channels, kernel_size=3, padding=1, bias=config.bias)
        self.post_init()

    @property
    def num_output_channels(self) -> int:
        return self.config.num_output_channels

    def pad(self, images: Tensor) -> Tensor:
        """Images mirrored below and to the right, as in the official evaluation of the published weights."""
        return pad_by_reflection(images, self.config.size_multiple)

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
