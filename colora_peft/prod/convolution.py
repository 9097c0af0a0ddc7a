"""Filtering on one core, fast for the kernels of PROD: small or round Gaussians, thin lines and paths.

Channels are filtered one by one where they lie, (C, H, W): a plane of a patch fits into a core's cache, and nothing
has to be transposed for OpenCV. As in OpenCV and PyTorch, kernels are not mirrored, and their origin is their middle.
"""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
import torch
from torch import Tensor

# From 130 taps on `cv2.filter2D` uses a Fourier transform. It costs the same however many taps are zero, and up to
# some 700 taps that are not it costs more than the direct sum, in which zeros cost nothing.
_DIRECT_AREA_MAX = 129


def to_planes(image: Tensor) -> np.ndarray:
    """Returns a tensor (3, H, W) as the array that OpenCV reads plane by plane; it may share the tensor's memory."""
    return np.ascontiguousarray(image.numpy())


def to_image(planes: np.ndarray) -> Tensor:
    """Returns an array (3, H, W) as a tensor on the same memory, clipped to [0, 1]."""
    return torch.from_numpy(planes).clamp_(0, 1)


def convolve(image: np.ndarray, kernel: np.ndarray, border: int = cv2.BORDER_REFLECT_101) -> np.ndarray:
    """Returns (C, H, W) float32 filtered by a (K, K) float32 kernel, K odd; `border` is one of OpenCV's."""
    radius = kernel.shape[0] // 2
    height, width = image.shape[1:]
    blocks = list(direct_blocks(kernel))
    result = np.empty(image.shape, np.float32)
    for plane, filtered in zip(image, result, strict=True):
        padded = cv2.copyMakeBorder(plane, radius, radius, radius, radius, border)
        for number, (top, left, block) in enumerate(blocks):
            rows, columns = block.shape
            window = padded[top : top + height + rows - 1, left : left + width + columns - 1]
            part = cv2.filter2D(window, -1, block, anchor=(0, 0))[:height, :width]
            np.copyto(filtered, part) if number == 0 else np.add(filtered, part, out=filtered)
    return result


def direct_blocks(kernel: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """Cuts a kernel into (top, left, block) that together hold all of its taps.

    Each is small enough to be summed directly, unless a single row is not: that then takes the Fourier transform.
    """
    taps = kernel != 0
    lefts = taps.argmax(axis=1).tolist()
    rights = (taps.shape[1] - taps[:, ::-1].argmax(axis=1)).tolist()
    filled = np.flatnonzero(taps.any(axis=1)).tolist()
    while filled:
        top, left, right = filled[0], lefts[filled[0]], rights[filled[0]]
        bottom = top
        for row in filled:
            wider = min(left, lefts[row]), max(right, rights[row])
            if row > top and (row + 1 - top) * (wider[1] - wider[0]) > _DIRECT_AREA_MAX:
                break
            bottom, (left, right) = row + 1, wider
        yield top, left, kernel[top:bottom, left:right]
        filled = [row for row in filled if row >= bottom]


def convolve_separably(image: np.ndarray, weights: np.ndarray, border: int = cv2.BORDER_REFLECT_101) -> np.ndarray:
    """Returns (C, H, W) float32 filtered along both axes by the same (K,) float32 weights."""
    result = np.empty(image.shape, np.float32)
    for plane, filtered in zip(image, result, strict=True):
        cv2.sepFilter2D(plane, -1, weights, weights, dst=filtered, borderType=border)
    return result
