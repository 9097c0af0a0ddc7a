"""Kernels of blur, streaks and camera shake: float32 arrays that sum to 1, of odd size, origin at their middle."""

from __future__ import annotations

import math

import numpy as np
import torch

# A sigma far below a pixel is a line of single pixels; the floor keeps exp() away from 0 / 0.
_SMALLEST_SIGMA_PX = 0.05
# All weights below this together change no float32 sum, but each costs as much as any other.
_NEGLIGIBLE_WEIGHT = 1e-10


def gaussian_weights(sigma_px: float) -> np.ndarray:
    """Returns a Gaussian along one axis, (K,) with K = 2 * ceil(3 * sigma) + 1; its outer square is the round one."""
    radius = math.ceil(3 * sigma_px)
    x = np.arange(-radius, radius + 1, dtype=np.float32)
    weights = np.exp(-0.5 * (x / max(sigma_px, _SMALLEST_SIGMA_PX)) ** 2)
    return weights / weights.sum()


def gaussian_kernel(sigma_x_px: float, sigma_y_px: float, angle_deg: float) -> np.ndarray:
    """Returns a Gaussian whose first axis is turned by `angle_deg`, (K, K), K = 2 * ceil(3 * the larger sigma) + 1."""
    radius = math.ceil(3 * max(sigma_x_px, sigma_y_px))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1].astype(np.float32)
    cos, sin = math.cos(math.radians(angle_deg)), math.sin(math.radians(angle_deg))
    along = (cos * x + sin * y) / max(sigma_x_px, _SMALLEST_SIGMA_PX)
    across = (cos * y - sin * x) / max(sigma_y_px, _SMALLEST_SIGMA_PX)
    kernel = np.exp(-0.5 * (along**2 + across**2))
    kernel /= kernel.sum()
    kernel[kernel < _NEGLIGIBLE_WEIGHT] = 0
    return kernel


def disc_kernel(diameter_px: float) -> np.ndarray:
    """Returns an even disc with an edge of one pixel, as of a lens out of focus; one pixel up to a diameter of 1."""
    radius = max(0, math.ceil(diameter_px / 2 - 0.5))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    kernel = np.clip(diameter_px / 2 + 0.5 - np.hypot(x, y), 0, 1).astype(np.float32)
    return np.ones((1, 1), np.float32) if radius == 0 else kernel / kernel.sum()


def line_kernel(length_px: float, angle_deg: float) -> np.ndarray:
    """Returns a straight line through the centre; 0 degrees is vertical, 90 horizontal."""
    steps = np.linspace(-0.5, 0.5, max(2, math.ceil(2 * length_px))) * length_px
    angle = math.radians(angle_deg)
    return path_kernel(steps * math.sin(angle), steps * math.cos(angle))


def motion_kernel(length_px: float, angle_deg: float, shake_deg: float, seed: int) -> np.ndarray:
    """Returns a walk of `length_px` in half-pixel steps, centred on its mean position; see `MotionBlur`."""
    steps = max(2, math.ceil(2 * length_px))
    turns = torch.randn(steps, generator=torch.Generator().manual_seed(seed)).numpy()
    heading = np.radians(angle_deg) + np.cumsum(turns) * np.radians(shake_deg) / math.sqrt(steps)
    x_px = np.cumsum(np.cos(heading)) * length_px / steps
    y_px = np.cumsum(np.sin(heading)) * length_px / steps
    # Centred, the blurred image stays registered with its clean target.
    return path_kernel(x_px - x_px.mean(), y_px - y_px.mean())


def path_kernel(x_px: np.ndarray, y_px: np.ndarray) -> np.ndarray:
    """Returns the path of a point that spends equal time at each (x, y), (N,) each, spread bilinearly over pixels."""
    radius = max(1, math.ceil(max(np.abs(x_px).max(), np.abs(y_px).max())))
    size = 2 * radius + 1
    left, top = np.floor(x_px).astype(int), np.floor(y_px).astype(int)
    right_share, bottom_share = x_px - left, y_px - top
    corner = (top + radius) * (size + 1) + left + radius
    pixels = np.concatenate([corner, corner + 1, corner + size + 1, corner + size + 2])
    weights = np.concatenate(
        [
            (1 - bottom_share) * (1 - right_share),
            (1 - bottom_share) * right_share,
            bottom_share * (1 - right_share),
            bottom_share * right_share,
        ]
    )
    # One row and column more than the kernel: there fall the zero shares of a point on its last row or column.
    kernel = np.bincount(pixels, weights, (size + 1) ** 2).reshape(size + 1, size + 1)[:size, :size]
    return (kernel / kernel.sum()).astype(np.float32)
