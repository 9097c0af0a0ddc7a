"""PSNR and SSIM of a network over whole images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from colora_peft.data import PairSource
from colora_peft.inference import evaluation_mode, reconstruct
from colora_peft.utils import alone_with

from .metrics import psnr, ssim


@torch.no_grad()  # not inference_mode: a module may keep what it makes, and is trained later
def evaluate(model: nn.Module, pairs: PairSource, device: torch.device, description: str) -> dict[str, float]:
    """Returns the mean PSNR (dB) and SSIM of whole restored images, `psnr` and `ssim`, and of the inputs, `*_input`.

    Figures are per image in RGB on [0, 1] after rounding to 8 bits, then averaged. The network is in evaluation mode
    meanwhile and as before afterwards.

    Args:
        model: Any network that `colora_peft.inference.reconstruct` takes.
        pairs: The pairs to restore.
        device: Device of the network.
        description: Label of a progress bar; an empty one shows none.
    """
    rows = []
    with alone_with(model), evaluation_mode(model):
        bar = tqdm(range(len(pairs)), desc=description, unit="image", leave=False, disable=not description)
        for index in bar:
            degraded, target = (image.to(device)[None] for image in pairs[index])
            restored = reconstruct(model, degraded).float()
            figures = psnr(restored, target), ssim(restored, target), psnr(degraded, target), ssim(degraded, target)
            rows.append([figure.item() for figure in figures])
    means = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
    return dict(zip(("psnr", "ssim", "psnr_input", "ssim_input"), means, strict=True))


@torch.no_grad()
def restore_some(model: nn.Module, pairs: PairSource, count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Returns (input, restored, target), each (3, H, W) in [0, 1] on the CPU, of `count` pairs spread over the set."""
    device = next(model.parameters()).device
    rows = []
    with alone_with(model), evaluation_mode(model):
        for index in torch.linspace(0, len(pairs) - 1, min(count, len(pairs))).round().int().tolist():
            degraded, target = pairs[index]
            restored = reconstruct(model, degraded[None].to(device))[0].float().clamp(0, 1).cpu()
            rows.append((degraded, restored, target))
    return rows
