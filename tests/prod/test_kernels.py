"""The kernels of blur, rain and motion blur have the moments that their parameters ask for."""

import math

import numpy as np
import pytest
import torch

from colora_peft.prod import GaussianBlur, MotionBlur, Rain
from colora_peft.prod.kernels import disc_kernel, gaussian_kernel, gaussian_weights, line_kernel, motion_kernel


def second_moments(kernel):
    """Centroid (x, y) and covariance (2, 2) of a kernel, x first, origin at its middle."""
    kernel = kernel.astype(np.float64)
    radius = kernel.shape[0] // 2
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    points = np.stack([x.ravel(), y.ravel()])
    centre = points @ kernel.ravel()
    offsets = points - centre[:, None]
    return centre, (offsets * kernel.ravel()) @ offsets.T


@pytest.mark.parametrize(
    "kernel",
    [
        gaussian_kernel(0.3, 0.3, 0),
        gaussian_kernel(3.0, 0.4, 70),
        np.outer(gaussian_weights(1.3), gaussian_weights(1.3)),
        disc_kernel(0.0),
        disc_kernel(1.6),
        disc_kernel(4.0),
        line_kernel(17.0, 25),
        motion_kernel(2.0, 10, 0, 0),
        motion_kernel(25.0, 100, 90, 3),
    ],
)
def test_kernels_are_weights(kernel):
    assert kernel.min() >= 0
    assert kernel.sum() == pytest.approx(1, abs=1e-5)
    assert kernel.shape[0] == kernel.shape[1] and kernel.shape[0] % 2 == 1


@pytest.mark.parametrize(
    ("sigma_x", "sigma_y", "angle"), [(1.5, 1.5, 0), (3, 1, 0), (1, 3, 0), (3, 1, 30), (2, 1, 135)]
)
def test_a_gaussian_has_the_spread_and_the_direction_it_was_given(sigma_x, sigma_y, angle):
    centre, covariance = second_moments(gaussian_kernel(sigma_x, sigma_y, angle))
    turn = math.radians(angle)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    expected = rotation @ np.diag([sigma_x**2, sigma_y**2]) @ rotation.T
    np.testing.assert_allclose(centre, 0, atol=1e-5)
    # The kernel ends at three standard deviations, which takes off up to 3% of the variance.
    np.testing.assert_allclose(covariance, expected, atol=0.04 * max(sigma_x, sigma_y) ** 2)


@pytest.mark.parametrize("seed", range(20))
def test_every_kernel_that_is_drawn_sums_to_one(seed):
    drawn = torch.Generator().manual_seed(seed)
    blur, motion, rain = (degradation.draw(drawn) for degradation in (GaussianBlur(), MotionBlur(), Rain()))
    for kernel in (
        gaussian_kernel(**blur),
        motion_kernel(**motion),
        line_kernel(rain["length_px"], rain["angle_deg"]),
        disc_kernel(rain["focus_blur_px"]),
    ):
        assert kernel.dtype == np.float32 and kernel.min() >= 0
        assert kernel.sum(dtype=np.float64) == pytest.approx(1, abs=1e-5)


def test_a_disc_has_the_spread_of_its_diameter():
    for diameter_px in (2.0, 4.0, 7.0):
        _, covariance = second_moments(disc_kernel(diameter_px))
        # The variance of a disc is diameter^2 / 16 along any axis; pixels and the soft edge add 1/6 at most.
        np.testing.assert_allclose(np.diag(covariance), diameter_px**2 / 16, atol=1 / 6)
        assert abs(covariance[0, 1]) < 1e-9
    assert disc_kernel(1.0).shape == (1, 1)


@pytest.mark.parametrize("shake_deg", [0, 30, 90])
def test_motion_stays_registered_with_the_clean_image(shake_deg):
    for seed in range(5):
        centre, _ = second_moments(motion_kernel(20.0, 37.0 * seed, shake_deg, seed))
        assert np.abs(centre).max() < 0.01


@pytest.mark.parametrize("angle_deg", [0, 45, 100])
def test_motion_without_shake_is_a_line_of_the_given_length(angle_deg):
    for length_px in (6.0, 24.0):
        _, covariance = second_moments(motion_kernel(length_px, angle_deg, 0, seed=1))
        thin, wide = np.linalg.eigvalsh(covariance)
        # The variance along a uniform line is length^2 / 12; spreading over pixels adds at most 1/4 an axis.
        assert wide == pytest.approx(length_px**2 / 12, abs=0.3)
        assert thin < 0.3
        direction = np.linalg.eigh(covariance)[1][:, 1]
        turn = math.radians(angle_deg)
        assert abs(direction @ [math.cos(turn), math.sin(turn)]) > 0.99


@pytest.mark.parametrize("shake_deg", [0, 40, 90])
def test_a_path_is_as_long_and_turns_as_much_as_it_should(shake_deg):
    """The end-to-end distance of a walk whose heading spreads like Brownian motion, in closed form."""
    length_px = 24.0
    squares = []
    for seed in range(400):
        thin, wide = np.linalg.eigvalsh(second_moments(motion_kernel(length_px, 0, shake_deg, seed))[1])
        squares.append(thin + wide)
    # Spread of a path about its mean: half the mean squared distance of two of its points, (length u, u in [0, 1])
    # apart, whose headings decorrelate as exp(-shake^2 u / 2).
    rate = math.radians(shake_deg) ** 2 / 2
    u = (np.arange(1000) + 0.5) / 1000
    squared = u**2 if rate == 0 else 2 * (rate * u - 1 + np.exp(-rate * u)) / rate**2
    expected = length_px**2 * np.mean((1 - u) * squared)
    # Spreading a point over four pixels adds 1/6 along each axis on average.
    assert np.mean(squares) == pytest.approx(expected + 1 / 3, rel=0.05)


def test_shake_bends_the_path():
    def thickness(shake_deg):
        return np.mean(
            [np.linalg.eigvalsh(second_moments(motion_kernel(24, 0, shake_deg, s))[1])[0] for s in range(20)]
        )

    assert thickness(90) > 2 * thickness(30) > 2 * thickness(0)
