"""Filtering by blocks and along axes is what the plain double sum gives, for every kernel that PROD can draw."""

import cv2
import numpy as np
import pytest
from scipy.ndimage import correlate

from colora_peft.prod.convolution import convolve, convolve_separably, direct_blocks
from colora_peft.prod.kernels import gaussian_kernel, gaussian_weights, line_kernel, motion_kernel

KERNELS = {
    "one pixel": np.ones((1, 1), np.float32),
    "small": gaussian_kernel(0.7, 0.3, 20),
    "dense": gaussian_kernel(3.0, 2.5, 20),
    "thin": gaussian_kernel(3.0, 0.3, 80),
    "vertical": line_kernel(30.0, 0),
    "horizontal": line_kernel(30.0, 90),
    "diagonal": line_kernel(30.0, -40),
    "path": motion_kernel(25.0, 30, 90, seed=2),
    "apart": np.pad(np.eye(2, dtype=np.float32), ((0, 15), (15, 0))) / 2,
}
each_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())


def sample_image(height=40, width=33):
    return np.random.default_rng(0).random((3, height, width), np.float32)


def plain(image, kernel, mode):
    return np.stack([correlate(plane, kernel.astype(np.float64), output=np.float64, mode=mode) for plane in image])


@each_kernel
@pytest.mark.parametrize(("border", "mode"), [(cv2.BORDER_REFLECT_101, "mirror"), (cv2.BORDER_WRAP, "grid-wrap")])
def test_convolution_is_the_plain_sum(kernel, border, mode):
    image = sample_image()
    before = image.copy()
    filtered = convolve(image, kernel, border)
    assert filtered.dtype == np.float32 and filtered.flags["C_CONTIGUOUS"]
    np.testing.assert_allclose(filtered, plain(image, kernel, mode), atol=1e-6, rtol=0)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 5)])
def test_images_smaller_than_the_kernel_are_reflected_as_often_as_it_takes(size):
    image = sample_image(*size)
    kernel = KERNELS["path"]
    np.testing.assert_allclose(convolve(image, kernel), plain(image, kernel, "mirror"), atol=1e-6, rtol=0)


@each_kernel
def test_blocks_hold_every_tap_once_and_are_summed_directly(kernel):
    together = np.zeros_like(kernel)
    for top, left, block in direct_blocks(kernel):
        rows, columns = block.shape
        assert rows * columns < 130
        together[top : top + rows, left : left + columns] += block
    np.testing.assert_array_equal(together, kernel)


@pytest.mark.parametrize("sigma_px", [0.01, 0.3, 1.0, 3.0])
def test_a_round_gaussian_is_separable(sigma_px):
    image = sample_image()
    whole = convolve(image, gaussian_kernel(sigma_px, sigma_px, 0))
    np.testing.assert_allclose(convolve_separably(image, gaussian_weights(sigma_px)), whole, atol=1e-6, rtol=0)
