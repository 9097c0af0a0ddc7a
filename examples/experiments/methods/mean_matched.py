"""PSNR without constant errors of colour and brightness, which tells these apart from all other errors of an image."""

from __future__ import annotations

from statistics import mean

import torch
from torch import Tensor, nn

from colora_peft.data import PairSource
from colora_peft.evaluation import psnr
from colora_peft.inference import evaluation_mode, reconstruct


def mean_matched(image: Tensor, target: Tensor) -> Tensor:
    """The image with a constant added to each channel, so that its means are those of the target; (..., 3, H, W)."""
    return image + (target - image).mean((-2, -1), keepdim=True)


@torch.no_grad()
def psnr_mean_matched(model: nn.Module, pairs: PairSource, device: torch.device) -> dict[str, float]:
    """Returns the mean PSNR (dB) of mean-matched images: `psnr_mean_matched`, of inputs `psnr_input_mean_matched`.

    Images are shifted as the network gives them, and clipped and rounded to 8 bits afterwards. In low light the same
    idea is known as GT mean, there as a factor on the whole image.

    Args:
        model: Any network that `colora_peft.inference.reconstruct` takes.
        pairs: The pairs to restore.
        device: Device of the network.
    """
    rows = []
    with evaluation_mode(model):
        for index in range(len(pairs)):
            degraded, target = (image.to(device)[None] for image in pairs[index])
            restored = reconstruct(model, degraded).float()
            rows.append([psnr(mean_matched(image, target), target).item() for image in (restored, degraded)])
    names = "psnr_mean_matched", "psnr_input_mean_matched"
    return {name: mean(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}
