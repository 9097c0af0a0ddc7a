"""PSNR and SSIM of a network over images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from colora_peft.data import PairSource
from colora_peft.inference import NotFinite, evaluation_mode, pools_locally, reconstruct, restore_image
from colora_peft.utils import alone_with

from .metrics import psnr, ssim

WHOLE_UP_TO_PX = 2048 * 2048
"""Number of pixels of the largest image that is restored at once, as memory grows with them; in tiles it does not."""


@torch.no_grad()  # not inference_mode: a module may keep what it makes, and is trained later
def evaluate(model: nn.Module, pairs: PairSource, device: torch.device, description: str) -> dict[str, float]:
    """Returns the mean PSNR (dB) and SSIM of restored images, `psnr` and `ssim`, and of the inputs, `*_input`.

    Images of up to WHOLE_UP_TO_PX are restored at once, larger ones in tiles, as `colora_peft.restore_image` does by
    default. Figures are per image in RGB on [0, 1] after rounding to 8 bits, then averaged. The network is in
    evaluation mode meanwhile and as before afterwards.

    Args:
        model: Any network that `colora_peft.inference.reconstruct` takes.
        pairs: The pairs to restore.
        device: Device of the network.
        description: Label of a progress bar; an empty one shows none.

    PSNR and SSIM are NaN if the network returns NaN or infinite values.
    """
    rows = []
    with alone_with(model), evaluation_mode(model):
        bar = tqdm(range(len(pairs)), desc=description, unit="image", leave=False, disable=not description)
        for index in bar:
            degraded, target = (image.to(device)[None] for image in pairs[index])
            restored = _restored(model, degraded[0])[None]
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
            restored = _restored(model, degraded.to(device)).clamp(0, 1).cpu()
            rows.append((degraded, restored, target))
    return rows


def _restored(model: nn.Module, image: Tensor) -> Tensor:
    """One image (3, H, W), restored; a large one in tiles, because it may not fit into memory at once.

    NaN everywhere if the network returns NaN or infinite values somewhere, so that figures of it are NaN, too.
    """
    if image.shape[1] * image.shape[2] <= WHOLE_UP_TO_PX:
        restored = reconstruct(model, image[None])[0].float()
        return restored if restored.isfinite().all() else torch.full_like(restored, torch.nan)
    try:
        return restore_image(model, image, pooling="tile" if pools_locally(model) else "picture")
    except NotFinite:
        return torch.full_like(image, torch.nan)
