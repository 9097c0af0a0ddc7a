"""Each degradation keeps the contract of an image, and does what its parameters say: laws, then calibration."""

import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from colora_peft.prod import JPEG, GaussianBlur, MotionBlur, Noise, Rain, default_degradations

ALL = default_degradations()
each = pytest.mark.parametrize("degradation", ALL, ids=lambda degradation: degradation.name)
RAIN = {
    "length_px": 12.0,
    "angle_deg": 0.0,
    "density": 0.01,
    "opacity": 0.8,
    "brightness": 0.9,
    "layers": 2,
    "seed": 5,
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def picture(height=48, width=61, seed=0):
    """Smooth waves and some texture, in all of [0, 1]."""
    y, x = torch.meshgrid(torch.linspace(0, 6, height), torch.linspace(0, 9, width), indexing="ij")
    waves = torch.stack([torch.sin(x + c) * torch.cos(y - c) for c in range(3)]) * 0.45 + 0.5
    return (waves + 0.1 * torch.randn(waves.shape, generator=generator(seed))).clamp(0, 1)


def grey(level, size=128):
    return torch.full((3, size, size), level)


def mean_slopes(image):
    """Mean absolute differences along (x, y)."""
    return image.diff(dim=2).abs().mean().item(), image.diff(dim=1).abs().mean().item()


@each
def test_the_result_is_an_image_and_the_input_is_left_alone(degradation):
    image = picture()
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
    image = picture()
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
def test_pictures_smaller_than_the_kernels_are_fine(degradation):
    for seed in range(6):
        result = degradation.apply(picture(5, 3), **degradation.draw(generator(seed)))
        assert result.shape == (3, 5, 3)
        assert result.isfinite().all()


@pytest.mark.parametrize(
    ("degradation", "fields"),
    [
        (GaussianBlur(), {"sigma_x_px": "sigma_px", "sigma_y_px": "sigma_px"}),
        (Noise(), {"std_255": "std_255", "shot_share": "shot_share", "colour_correlation": "colour_correlation"}),
        (Rain(), {name: name for name in ("length_px", "angle_deg", "density", "opacity", "brightness")}),
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
    image = picture()
    noise = {"shot_share": 0.5, "colour_correlation": 0.3, "seed": 1}
    assert torch.equal(GaussianBlur().apply(image, sigma_x_px=0, sigma_y_px=0, angle_deg=30), image)
    assert torch.equal(Noise().apply(image, std_255=0, **noise), image)
    assert torch.equal(Rain().apply(image, **{**RAIN, "opacity": 0}), image)
    assert torch.equal(Rain().apply(image, **{**RAIN, "density": 0}), image)
    assert torch.equal(MotionBlur().apply(image, length_px=0, angle_deg=0, shake_deg=50, seed=1), image)
    finest = JPEG().apply(image, quality=100, subsample_chroma=False)
    # Rounding to whole YCbCr levels and back, the worst pixel of a picture with saturated colours.
    assert (finest - image).abs().max() <= 5 / 255
    assert (finest - image).abs().mean() <= 1 / 255


# Blur and motion blur


@pytest.mark.parametrize("degradation", [GaussianBlur(), MotionBlur()], ids=lambda degradation: degradation.name)
def test_blurs_keep_constant_pictures_and_the_mean(degradation):
    flat = torch.tensor([0.2, 0.5, 0.9]).view(3, 1, 1).expand(3, 40, 40)
    image = picture(96, 96)
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
    image = picture()
    left = [sum(mean_slopes(MotionBlur().apply(image, length, 20, 20, seed=4))) for length in (2.0, 6.0, 18.0)]
    assert left[0] > left[1] > left[2]


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
    image = picture()
    buffer = io.BytesIO()
    pixels = (image * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=2 if subsample_chroma else 0)
    theirs = torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1) / 255
    ours = JPEG().apply(image, quality, subsample_chroma)
    # Two builds of libjpeg may round a few pixels differently.
    assert (ours - theirs).abs().mean() < 0.5 / 255
    assert (ours - theirs).abs().mean() < 0.2 * (ours - image).abs().mean()


def test_jpeg_error_falls_with_quality_and_without_subsampling():
    image = picture()
    errors = [(JPEG().apply(image, quality, True) - image).square().mean() for quality in (10, 30, 60, 95)]
    assert errors == sorted(errors, reverse=True)
    assert (JPEG().apply(image, 95, False) - image).square().mean() < errors[-1]


# Rain


def test_rain_moves_every_pixel_towards_the_brightness_of_water():
    image = picture()
    rainy = Rain().apply(image, **RAIN)
    change, way = rainy - image, RAIN["brightness"] - image
    assert (change * way >= 0).all()
    assert (change.abs() <= way.abs() * RAIN["opacity"] + 1e-6).all()
    assert change.abs().max() > 0.1


def test_denser_and_more_opaque_rain_hides_more():
    image = grey(0.2)

    def veil(**changes):
        return (Rain().apply(image, **{**RAIN, **changes}) - image).mean().item()

    for name, values in (("density", (0.001, 0.005, 0.02)), ("opacity", (0.2, 0.5, 0.9)), ("layers", (1, 2, 3))):
        amounts = [veil(**{name: value}) for value in values]
        assert amounts == sorted(amounts) and amounts[0] > 0
        assert amounts[-1] > 1.2 * amounts[0]
    assert veil(length_px=24.0) > veil(length_px=8.0)


def test_the_angle_turns_the_streaks():
    def slopes(angle_deg):
        return mean_slopes(Rain().apply(grey(0.2), **{**RAIN, "angle_deg": angle_deg, "length_px": 20.0}))

    across, along = slopes(0)
    assert across > 2 * along  # vertical streaks: much changes along x, little along y
    across, along = slopes(90)
    assert along > 2 * across

    def diagonal_slope(angle_deg):
        """Ratio of the changes along the two diagonals."""
        rain = Rain().apply(grey(0.2), **{**RAIN, "angle_deg": angle_deg, "length_px": 20.0})[0]
        return ((rain[1:, 1:] - rain[:-1, :-1]).abs().mean() / (rain[1:, :-1] - rain[:-1, 1:]).abs().mean()).item()

    assert diagonal_slope(40) < 0.8 and diagonal_slope(-40) > 1.25


def test_streaks_of_rain_have_the_length_they_were_given():
    """The width of a vertical streak's autocorrelation grows with the length, its breadth does not."""

    def correlation_at(length_px, dy, dx):
        rain = Rain().apply(grey(0.0), **{**RAIN, "length_px": length_px, "density": 0.002, "layers": 1})[0]
        rain = rain - rain.mean()
        moved = torch.roll(rain, (dy, dx), (0, 1))
        return ((rain * moved).mean() / rain.square().mean()).item()

    assert correlation_at(8.0, 8, 0) < 0.2 < 0.4 < correlation_at(24.0, 8, 0)
    assert correlation_at(24.0, 0, 4) < 0.2
