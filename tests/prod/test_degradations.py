"""Each degradation keeps the contract of an image, and does what its parameters say: laws, then calibration."""

import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from support.degradations import RAIN

from colora_peft.prod import JPEG, GaussianBlur, MotionBlur, Noise, Rain, default_degradations

ALL = default_degradations()
each = pytest.mark.parametrize("degradation", ALL, ids=lambda degradation: degradation.name)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def sample_image(height=48, width=61, seed=0):
    """Smooth waves and some texture, in all of [0, 1]."""
    y, x = torch.meshgrid(torch.linspace(0, 6, height), torch.linspace(0, 9, width), indexing="ij")
    waves = torch.stack([torch.sin(x + c) * torch.cos(y - c) for c in range(3)]) * 0.45 + 0.5
    return (waves + 0.1 * torch.randn(waves.shape, generator=generator(seed))).clamp(0, 1)


def grey(level, size=128):
    return torch.full((3, size, size), level)


def mean_slopes(image):
    """Mean absolute differences along (x, y)."""
    return image.diff(dim=2).abs().mean().item(), image.diff(dim=1).abs().mean().item()


def point(size=41):
    """One bright pixel in the middle of black."""
    image = torch.zeros(3, size, size)
    image[:, size // 2, size // 2] = 1
    return image


def spread(plane):
    """Covariance (2, 2) of a distribution over pixels, x first."""
    rows, columns = (torch.arange(size, dtype=torch.float64) - (size - 1) / 2 for size in plane.shape)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    moments = torch.stack([(plane * x * x).sum(), (plane * x * y).sum(), (plane * y * y).sum()]) / plane.sum()
    return torch.stack([moments[[0, 1]], moments[[1, 2]]])


@each
def test_the_result_is_an_image_and_the_input_is_left_alone(degradation):
    image = sample_image()
    before = image.clone()
    for seed in range(6):
        result = degradation.apply(image, **degradation.draw(generator(seed)))
        assert result.shape == image.shape
        assert result.dtype == torch.float32
        assert result.is_contiguous()
        assert result.min() >= 0 and result.max() <= 1
        assert not torch.equal(result, image)
        assert torch.equal(image, before)


@each
def test_parameters_are_a_recipe_that_survives_json(degradation):
    image = sample_image()
    for seed in range(4):
        parameters = degradation.draw(generator(seed))
        assert degradation.draw(generator(seed)) == parameters
        stored = json.loads(json.dumps(parameters))
        assert stored == parameters
        assert torch.equal(degradation.apply(image, **stored), degradation.apply(image, **parameters))


@each
def test_other_generators_draw_other_parameters(degradation):
    drawn = {json.dumps(degradation.draw(generator(seed))) for seed in range(20)}
    assert len(drawn) > 15


@each
def test_images_smaller_than_the_kernels_are_fine(degradation):
    for seed in range(6):
        result = degradation.apply(sample_image(5, 3), **degradation.draw(generator(seed)))
        assert result.shape == (3, 5, 3)
        assert result.isfinite().all()


@pytest.mark.parametrize(
    ("degradation", "fields"),
    [
        (GaussianBlur(), {"sigma_x_px": "sigma_px", "sigma_y_px": "sigma_px"}),
        (Noise(), {"std_255": "std_255", "shot_share": "shot_share", "colour_correlation": "colour_correlation"}),
        (
            Rain(),
            {name: name for name in ("length_px", "angle_deg", "density", "opacity", "brightness", "focus_blur_px")},
        ),
        (JPEG(quality=(30, 34)), {"quality": "quality"}),
        (MotionBlur(), {"length_px": "length_px", "shake_deg": "shake_deg"}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_draws_fill_the_ranges_and_stay_within(degradation, fields):
    source = generator()
    draws = [degradation.draw(source) for _ in range(300)]
    for parameter, field in fields.items():
        low, high = getattr(degradation, field)
        values = [draw[parameter] for draw in draws]
        assert low <= min(values) and max(values) <= high
        tenth = 0.1 * (high - low)
        assert min(values) <= low + tenth and max(values) >= high - tenth


def test_choices_are_drawn_as_often_as_they_say():
    source = generator()
    round_blurs = sum(
        draw["sigma_x_px"] == draw["sigma_y_px"] for draw in (GaussianBlur().draw(source) for _ in range(1000))
    )
    halved = sum(JPEG().draw(source)["subsample_chroma"] for _ in range(1000))
    # Five standard deviations of a binomial.
    assert abs(round_blurs - 500) < 5 * math.sqrt(250)
    assert abs(halved - 750) < 5 * math.sqrt(187.5)
    assert {Rain(layers=3).draw(source)["layers"] for _ in range(50)} == {1, 2, 3}
    # Log-uniform: half of the draws lie below the geometric mean.
    weak = sum(Noise().draw(source)["std_255"] < math.sqrt(50) for _ in range(1000))
    assert abs(weak - 500) < 5 * math.sqrt(250)


def test_the_weakest_setting_is_the_identity():
    image = sample_image()
    noise = {"shot_share": 0.5, "colour_correlation": 0.3, "seed": 1}
    assert torch.equal(GaussianBlur().apply(image, sigma_x_px=0, sigma_y_px=0, angle_deg=30), image)
    assert torch.equal(Noise().apply(image, std_255=0, **noise), image)
    assert torch.equal(Rain().apply(image, **{**RAIN, "opacity": 0}), image)
    assert torch.equal(Rain().apply(image, **{**RAIN, "density": 0}), image)
    assert torch.equal(MotionBlur().apply(image, length_px=0, angle_deg=0, shake_deg=50, seed=1), image)
    finest = JPEG().apply(image, quality=100, subsample_chroma=False)
    # Rounding to whole YCbCr levels and back, the worst pixel of an image with saturated colours.
    assert (finest - image).abs().max() <= 5 / 255
    assert (finest - image).abs().mean() <= 1 / 255


# Blur and motion blur


@pytest.mark.parametrize("degradation", [GaussianBlur(), MotionBlur()], ids=lambda degradation: degradation.name)
def test_blurs_keep_constant_images_and_the_mean(degradation):
    flat = torch.tensor([0.2, 0.5, 0.9]).view(3, 1, 1).expand(3, 40, 40)
    image = sample_image(96, 96)
    for seed in range(4):
        parameters = degradation.draw(generator(seed))
        torch.testing.assert_close(degradation.apply(flat, **parameters), flat.contiguous(), atol=1e-5, rtol=0)
        blurred = degradation.apply(image, **parameters)
        torch.testing.assert_close(blurred.mean((1, 2)), image.mean((1, 2)), atol=0.02, rtol=0)
        assert sum(mean_slopes(blurred)) < sum(mean_slopes(image))


def test_sigma_zero_leaves_its_axis_alone():
    columns = torch.rand(1, 1, 50, generator=generator()).expand(3, 40, 50).contiguous()
    kept = GaussianBlur().apply(columns, sigma_x_px=0, sigma_y_px=2, angle_deg=0)
    torch.testing.assert_close(kept, columns, atol=1e-5, rtol=0)
    assert (GaussianBlur().apply(columns, sigma_x_px=2, sigma_y_px=0, angle_deg=0) - columns).abs().max() > 0.1


def test_longer_motion_blurs_more():
    image = sample_image()
    left = [sum(mean_slopes(MotionBlur().apply(image, length, 20, 20, seed=4))) for length in (2.0, 6.0, 18.0)]
    assert left[0] > left[1] > left[2]


@pytest.mark.parametrize(("sigma_x", "sigma_y", "angle"), [(2.0, 2.0, 0.0), (1.0, 1.0, 30.0), (3.0, 1.0, 25.0)])
def test_a_point_is_blurred_to_the_gaussian_that_was_asked_for(sigma_x, sigma_y, angle):
    """Round ones are applied along the axes, others as a whole: each must spread a point as its sigmas say."""
    spot = GaussianBlur().apply(point(), sigma_x, sigma_y, angle)[0].double()
    covariance = spread(spot)
    turn = math.radians(angle)
    along = torch.tensor([math.cos(turn), math.sin(turn)], dtype=torch.float64)
    across = torch.tensor([-math.sin(turn), math.cos(turn)], dtype=torch.float64)
    for direction, sigma in ((along, sigma_x), (across, sigma_y)):
        assert (direction @ covariance @ direction).sqrt().item() == pytest.approx(sigma, rel=0.03)
    assert spot.sum().item() == pytest.approx(1, abs=1e-5)


def test_the_drawn_blurs_are_round_and_stretched():
    source = generator()
    stretches = []
    for _ in range(60):
        small, large = torch.linalg.eigvalsh(
            spread(GaussianBlur((1.0, 3.0)).apply(point(), **GaussianBlur((1.0, 3.0)).draw(source))[0].double())
        ).sqrt()
        stretches.append((large / small).item())
    assert 15 < sum(stretch < 1.01 for stretch in stretches) < 45
    assert max(stretches) > 2


# Noise


@pytest.mark.parametrize("std_255", [2, 20])
@pytest.mark.parametrize("shot_share", [0, 0.5, 1])
@pytest.mark.parametrize("correlation", [0, 0.8])
def test_noise_is_calibrated_at_mid_grey(std_255, shot_share, correlation):
    image = grey(0.5, 256)
    noise = (Noise().apply(image, std_255, shot_share, correlation, seed=3) - image).reshape(3, -1)
    measured = noise.std(dim=1) * 255
    torch.testing.assert_close(measured, torch.full((3,), float(std_255)), rtol=0.02, atol=0)
    rows, columns = torch.triu_indices(3, 3, 1)
    coefficients = torch.corrcoef(noise)[rows, columns]
    torch.testing.assert_close(coefficients, torch.full((3,), float(correlation)), rtol=0, atol=0.02)
    assert noise.mean().abs() * 255 < 0.03 * std_255


@pytest.mark.parametrize("shot_share", [0, 0.4, 1])
@pytest.mark.parametrize("level", [0.2, 0.8])
def test_noise_variance_is_linear_in_the_intensity(shot_share, level):
    image = grey(level, 256)
    noise = Noise().apply(image, 8, shot_share, 0.2, seed=9) - image
    expected = (8 / 255) ** 2 * ((1 - shot_share) + 2 * shot_share * level)
    assert noise.var().item() == pytest.approx(expected, rel=0.04)


@pytest.mark.parametrize("seed", range(6))
def test_the_noise_of_a_drawn_recipe_has_its_variance_at_every_intensity(seed):
    recipe = Noise(std_255=(1.0, 12.0)).draw(generator(seed))  # so weak that nothing is clipped
    std, shot = recipe["std_255"] / 255, recipe["shot_share"]
    for level in (0.25, 0.5, 0.75):
        image = grey(level, 256)
        noise = Noise().apply(image, **recipe) - image
        expected = std**2 * ((1 - shot) + 2 * shot * level)
        # 65,536 pixels: the variance of three colours, however alike, is known to 1%; four times that.
        assert noise.var().item() == pytest.approx(expected, rel=0.03)


def test_noise_of_neighbouring_pixels_is_independent_and_depends_on_the_seed():
    image = grey(0.5, 256)
    noise = Noise().apply(image, 10, 0.5, 0.5, seed=1) - image
    for shifted, kept in ((noise[:, 1:], noise[:, :-1]), (noise[..., 1:], noise[..., :-1])):
        assert torch.corrcoef(torch.stack([shifted.flatten(), kept.flatten()]))[0, 1].abs() < 0.02
    other = Noise().apply(image, 10, 0.5, 0.5, seed=2) - image
    assert torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1].abs() < 0.02


# JPEG


@pytest.mark.parametrize("subsample_chroma", [False, True])
@pytest.mark.parametrize("quality", [10, 60, 95])
def test_jpeg_is_what_pillow_writes(quality, subsample_chroma):
    image = sample_image()
    buffer = io.BytesIO()
    pixels = (image * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=2 if subsample_chroma else 0)
    theirs = torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1) / 255
    ours = JPEG().apply(image, quality, subsample_chroma)
    # Two builds of libjpeg may round a few pixels differently.
    assert (ours - theirs).abs().mean() < 0.5 / 255
    assert (ours - theirs).abs().mean() < 0.2 * (ours - image).abs().mean()


def test_jpeg_error_falls_with_quality_and_without_subsampling():
    image = sample_image()
    errors = [(JPEG().apply(image, quality, True) - image).square().mean() for quality in (10, 30, 60, 95)]
    assert errors == sorted(errors, reverse=True)
    assert (JPEG().apply(image, 95, False) - image).square().mean() < errors[-1]
