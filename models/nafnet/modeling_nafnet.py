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
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ImageSuperResolutionOutput

from .configuration_nafnet import NAFNetConfig


class LayerNorm2d(nn.Module):
    """Layer normalisation over the channels of each pixel: (B, C, H, W) to the same shape."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        channels_last = x.permute(0, 2, 3, 1)
        normed = F.layer_norm(channels_last, self.weight.shape, self.weight, self.bias, self.eps)
        return normed.permute(0, 3, 1, 2)


def simple_gate(x: Tensor) -> Tensor:
    """The product of the two halves of the channels, the only nonlinearity: (B, 2C, H, W) to (B, C, H, W)."""
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
        self.norm1 = LayerNorm2d(channels)
        self.norm2 = LayerNorm2d(channels)
        # Zero at first, so that every block starts as the identity.
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        branch = simple_gate(self.conv2(self.conv1(self.norm1(x))))
        branch = self.conv3(branch * self.sca(branch))
        x = x + branch * self.beta
        branch = self.conv5(simple_gate(self.conv4(self.norm2(x))))
        return x + branch * self.gamma


def stage(channels: int, num_blocks: int) -> nn.Sequential:
    return nn.Sequential(*[NAFBlock(channels) for _ in range(num_blocks)])


class NAFNetPreTrainedModel(PreTrainedModel):
    config_class = NAFNetConfig
    base_model_prefix = "nafnet"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["NAFBlock"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own initialisation, as the official code uses, instead of the normal one of transformers."""
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
        elif isinstance(module, LayerNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, NAFBlock):
            nn.init.zeros_(module.beta)
            nn.init.zeros_(module.gamma)


class NAFNetForImageRestoration(NAFNetPreTrainedModel):
    """NAFNet that maps degraded images to restored ones of the same size."""

    # Prefixes of the modules after the bottleneck: what "decoder only" fine-tuning trains.
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

    def get_input_embeddings(self) -> nn.Module:
        """The first layer: transformers makes its output require a gradient where blocks are checkpointed."""
        return self.intro

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None
    ) -> ImageSuperResolutionOutput | tuple[Tensor, ...]:
        """Restore a batch of images of any size.

        Args:
            pixel_values: Degraded images (B, C, H, W) in [0, 1].
            labels: Clean images of the same shape; if given, `loss` is their mean absolute difference to the
                restored ones.
            return_dict: `False` returns a tuple `(loss, reconstruction)` without the parts that are None.

        Returns:
            A ModelOutput with `loss` (scalar, or None without labels) and `reconstruction` (B, C, H, W), not clamped.

        Raises:
            ValueError: if `pixel_values` is not 4-D with `config.num_channels` channels, or `labels` differs in shape.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"The pixel_values must have the shape (batch, {self.config.num_channels}, height, width), "
                f"got {tuple(pixel_values.shape)}."
            )
        if labels is not None and labels.shape != pixel_values.shape:
            raise ValueError(
                f"The labels must have the shape of pixel_values {tuple(pixel_values.shape)}, "
                f"got {tuple(labels.shape)}."
            )
        reconstruction = self._restore(pixel_values)
        loss = None if labels is None else F.l1_loss(reconstruction, labels)
        if return_dict is None:
            return_dict = self.config.return_dict
        if not return_dict:
            return (reconstruction,) if loss is None else (loss, reconstruction)
        return ImageSuperResolutionOutput(loss=loss, reconstruction=reconstruction)

    def _restore(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        multiple = self.config.pads_to_multiple
        # Zeros below and to the right, as in the official code: its published weights were tested that way.
        padded = F.pad(images, (0, -width % multiple, 0, -height % multiple))
        x = self.intro(padded)
        skips = []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            x = encoder(x)
            skips.append(x)
            x = down(x)
        x = self.middle_blks(x)
        for up, skip, decoder in zip(self.ups, reversed(skips), self.decoders, strict=True):
            x = decoder(up(x) + skip)
        return (self.ending(x) + padded)[..., :height, :width]
