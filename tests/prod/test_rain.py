"""Rain: streaks of the angle, length, density, depth, focus and brightness that the parameters say."""

import math

import pytest
import torch
from support.degradations import RAIN

from colora_peft.prod import GaussianBlur, Rain


def sample_image(height=48, width=61, seed=0):
    """Smooth waves and some texture, in all of [0, 1]."""
    y, x = torch.meshgrid(torch.linspace(0, 6, height), torch.linspace(0, 9, width), indexing="ij")
    waves = torch.stack([torch.sin(x + c) * torch.cos(y - c) for c in range(3)]) * 0.45 + 0.5
    return (waves + 0.1 * torch.randn(waves.shape, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)


def grey(level, size=128):
    return torch.full((3, size, size), level)


def mean_slopes(image):
    """Mean absolute differences along (x, y)."""
    return image.diff(dim=2).abs().mean().item(), image.diff(dim=1).abs().mean().item()


def test_rain_moves_every_pixel_towards_the_brightness_of_water():
    image = sample_image()
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


def streaks(**changes):
    """The veil of rain alone: white water, black image, one layer unless told."""
    settings = {**RAIN, "layers": 1, "opacity": 1.0, "brightness": 1.0, **changes}
    return Rain().apply(grey(0.0, 256), **settings)[0]


@pytest.mark.parametrize("angle_deg", [-40.0, -12.0, 0.0, 25.0, 40.0])
def test_streaks_lie_at_the_angle_that_was_asked_for(angle_deg):
    """The structure tensor's weakest direction is the one along the streaks."""
    rain = Rain().apply(grey(0.0, 256), **{**RAIN, "layers": 1, "angle_deg": angle_deg, "length_px": 24.0})
    # Differences between neighbours see the directions of fine streaks askew; of soft ones they do not.
    rain = GaussianBlur().apply(rain, sigma_x_px=2.0, sigma_y_px=2.0, angle_deg=0.0)[0]
    x_slope, y_slope = (rain[1:-1, 2:] - rain[1:-1, :-2]).double(), (rain[2:, 1:-1] - rain[:-2, 1:-1]).double()
    tensor = torch.stack([(a * b).sum() for a in (x_slope, y_slope) for b in (x_slope, y_slope)]).view(2, 2)
    x, y = torch.linalg.eigh(tensor)[1][:, 0].tolist()
    assert math.degrees(math.atan(x / y)) == pytest.approx(angle_deg, abs=2)


@pytest.mark.parametrize("focus_blur_px", [1.0, 4.0])
def test_sparse_rain_veils_in_proportion_to_density_and_length(focus_blur_px):
    """Streaks of 3/4 the full strength on average, a pixel wide in focus; out of focus they keep their light."""
    for density, length_px in ((0.0005, 10.0), (0.001, 10.0), (0.0005, 20.0)):
        veil = streaks(density=density, length_px=length_px, angle_deg=0.0, focus_blur_px=focus_blur_px).mean().item()
        # Some 32 or more streaks: their number is known to 18%.
        assert veil == pytest.approx(0.75 * density * length_px, rel=0.35)


def test_streaks_out_of_focus_are_wider_and_fainter_and_hold_as_much_light():
    sharp, soft = (streaks(density=0.0005, focus_blur_px=diameter) for diameter in (1.0, 4.0))
    assert soft.mean().item() == pytest.approx(sharp.mean().item(), rel=0.05)
    assert soft.max() < 0.6 * sharp.max()
    assert (soft > 0.01).sum() > 2 * (sharp > 0.01).sum()


def test_farther_streaks_are_shorter_and_fainter():
    """The second and third layer add to the first, while streaks are too few to meet."""
    one, two, three = (streaks(density=0.0003, length_px=24.0, focus_blur_px=1.0, layers=n) for n in (1, 2, 3))
    for added, distance in ((two - one, 2), (three - two, 3)):
        assert added.max().item() == pytest.approx(1 / distance, abs=0.1)
        columns = (added > 0.01).sum(dim=0)
        assert columns[columns > 0].float().median().item() == pytest.approx(24 / distance, abs=3)


def test_water_has_the_brightness_it_was_given():
    for brightness in (0.7, 1.0):
        rain = Rain().apply(
            grey(0.0), **{**RAIN, "density": 0.2, "opacity": 1.0, "brightness": brightness, "length_px": 30.0}
        )
        assert rain.max().item() == pytest.approx(brightness, abs=1e-5)
