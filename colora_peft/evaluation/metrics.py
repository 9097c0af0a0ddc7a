"""PSNR and SSIM as the project reports them: per image, in RGB on [0, 1], after rounding to 8 bits.

Rounding first makes the figures those of the saved image. Averages are over images, not over pooled pixels.
SSIM: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural similarity", IEEE
TIP 13(4), 2004: Gaussian window of 11 x 11 with sigma 1.5, K1 = 0.01, K2 = 0.03.
"""

import torch
from torch import Tensor

PSNR_CAP_DB = 100.0

SSIM_WINDOW_PX = 11
_WINDOW_SIGMA = 1.5
_C1 = 0.01**2
_C2 = 0.03**2
_STRIP_PX = 1024 * 1024
"""Number of pixels of which SSIM is taken at once. It keeps a dozen maps in float64 meanwhile."""


@torch.no_grad()
def psnr(restored: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, (B,), in dB.

    It is capped at 100 dB, which identical images get: an infinite value would swallow every mean and has no place in
    JSON. Nothing of use is lost: a single value that is one level off in an image of 512 x 512 gives 107 dB. NaN stays
    NaN.

    Args:
        restored: (B, C, H, W) float; clamped to [0, 1] and rounded to 8 bits, as `target`.
        target: Images of the same shape.

    Raises:
        ValueError: The shapes differ, or the images are not 4-D, empty or not floating point.
    """
    restored, target = _eight_bit(restored, target)
    mean_squared_error = (restored - target).square().flatten(1).mean(dim=1)
    return (-10.0 * torch.log10(mean_squared_error)).clamp(max=PSNR_CAP_DB)


@torch.no_grad()
def ssim(restored: Tensor, target: Tensor) -> Tensor:
    """Structural similarity of each image, (B,), at most 1 (Wang et al. 2004, equation 13).

    Variances with the window's own weights (biased), mean over the channels and over the positions where the window
    lies inside the image. Equals scikit-image's structural_similarity(gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=1).

    Args:
        restored: (B, C, H, W) float, H and W at least 11; clamped to [0, 1] and rounded to 8 bits, as `target`.
        target: Images of the same shape.

    Raises:
        ValueError: As `psnr`, or an image is smaller than the window.
    """
    restored, target = _eight_bit(restored, target)
    height, width = target.shape[-2:]
    if min(height, width) < SSIM_WINDOW_PX:
        raise ValueError(
            f"SSIM needs images of at least {SSIM_WINDOW_PX} x {SSIM_WINDOW_PX} pixels, its window, got {height} x "
            f"{width}: leave out smaller ones."
        )
    positions, rows = height - SSIM_WINDOW_PX + 1, max(1, _STRIP_PX // width)
    sums = []
    for top in range(0, positions, rows):
        strip = slice(top, min(top + rows, positions) + SSIM_WINDOW_PX - 1)
        sums.append(_similarity(restored[..., strip, :], target[..., strip, :]).sum((-2, -1)))
    return (sum(sums) / (positions * (width - SSIM_WINDOW_PX + 1))).mean(dim=1).float()


def _similarity(restored: Tensor, target: Tensor) -> Tensor:
    """SSIM at each position where the window lies inside the images."""
    if target.device.type != "mps":  # which has no float64; in float32 flat areas are off by 1e-4
        restored, target = restored.double(), target.double()
    mean_x, mean_y = _windowed(restored), _windowed(target)
    variance_x = _windowed(restored.square()) - mean_x.square()
    variance_y = _windowed(target.square()) - mean_y.square()
    covariance = _windowed(restored * target) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x.square() + mean_y.square() + _C1)
    contrast_structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
    return luminance * contrast_structure


def _eight_bit(restored: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Returns both images in float32 on the 256 levels k / 255."""
    if restored.shape != target.shape:
        raise ValueError(
            f"The restored images have shape {tuple(restored.shape)}, the targets {tuple(target.shape)}: make them "
            "equal."
        )
    if target.ndim != 4 or target.numel() == 0:
        raise ValueError(f"Images must be (B, C, H, W) and not empty, got shape {tuple(target.shape)}.")
    for name, image in (("restored", restored), ("target", target)):
        if not image.is_floating_point():
            raise ValueError(
                f"The {name} images are {image.dtype}: pass floats in [0, 1] (divide 8-bit images by 255)."
            )
    restored, target = restored.detach().float(), target.detach().to(restored.device, torch.float32)
    return tuple(image.clamp(0, 1).mul(255).round().div(255) for image in (restored, target))


def _windowed(x: Tensor) -> Tensor:
    """Returns Gaussian-weighted means around each position where the window fits, (B, C, H - 10, W - 10).

    These are shifted sums: a convolution may run in TF32 on a GPU, or in half precision under autocast, and both are
    too coarse for a variance that is a small difference of squares.
    """
    offsets = range(-(SSIM_WINDOW_PX // 2), SSIM_WINDOW_PX // 2 + 1)
    exponents = torch.tensor([-0.5 * (offset / _WINDOW_SIGMA) ** 2 for offset in offsets], dtype=torch.float64)
    weights = exponents.softmax(0).tolist()
    for dim in (-2, -1):
        length = x.shape[dim] - SSIM_WINDOW_PX + 1
        x = sum(weight * x.narrow(dim, index, length) for index, weight in enumerate(weights))
    return x
