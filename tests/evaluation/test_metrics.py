"""PSNR and SSIM against hand-computed numbers and scikit-image."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from colora_peft.evaluation.metrics import PSNR_CAP_DB, psnr, ssim


def noisy_pair(height=40, width=53, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(3, 3, height, width, generator=generator)
    noise = torch.randn(target.shape, generator=generator) * torch.tensor([0.02, 0.1, 0.4]).view(3, 1, 1, 1)
    return (target + noise), target


def test_psnr_of_a_constant_error_is_known():
    target = torch.full((1, 3, 8, 8), 100 / 255)
    assert psnr(target + 51 / 255, target).item() == pytest.approx(20 * math.log10(5), abs=1e-4)
    # Half the pixels are wrong by 10 levels: mean squared error 50.
    restored = target.clone()
    restored[..., :4] += 10 / 255
    assert psnr(restored, target).item() == pytest.approx(10 * math.log10(255**2 / 50), abs=1e-3)


def test_images_are_judged_one_by_one_and_in_order():
    restored, target = noisy_pair()
    for metric in (psnr, ssim):
        together = metric(restored, target)
        assert together.shape == (3,)
        assert together[0] > together[1] > together[2]
        alone = torch.cat([metric(restored[i : i + 1], target[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(together, alone)


def test_rounding_to_8_bits_and_clamping_come_first():
    target = torch.full((1, 3, 16, 16), 128 / 255)
    assert psnr(target + 0.4 / 255, target).item() == PSNR_CAP_DB
    white = torch.ones(1, 3, 16, 16)
    assert psnr(white * 7, white).item() == PSNR_CAP_DB
    assert ssim(white * 7, white).item() == pytest.approx(1.0, abs=1e-6)


def test_psnr_never_rewards_an_error_above_identity():
    target = torch.zeros(1, 1, 512, 512)
    restored = target.clone()
    restored[0, 0, 0, 0] = 1 / 255
    assert psnr(restored, target).item() <= psnr(target, target).item() == PSNR_CAP_DB


@pytest.mark.parametrize("size", [(11, 11), (40, 53)])
def test_ssim_equals_scikit_image(size):
    restored, target = noisy_pair(*size)
    ours = ssim(restored, target)
    for i in range(3):
        x, y = ((t[i].clamp(0, 1) * 255).round().numpy().astype(np.float64) / 255 for t in (restored, target))
        theirs = structural_similarity(
            x, y, channel_axis=0, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert ours[i].item() == pytest.approx(theirs, abs=1e-5)


def test_ssim_of_a_large_image_is_taken_in_strips_and_the_same(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    restored, target = torch.rand(2, 2, 3, 47, 30, generator=generator)
    whole = ssim(restored, target)
    for rows in (1, 5, 36, 37):
        monkeypatch.setattr("colora_peft.evaluation.metrics._STRIP_PX", rows * 30 + 29)
        torch.testing.assert_close(ssim(restored, target), whole, rtol=0, atol=1e-6)


def test_ssim_of_two_flat_images_is_the_luminance_term():
    x, y = 51 / 255, 204 / 255
    expected = (2 * x * y + 1e-4) / (x * x + y * y + 1e-4)
    assert ssim(torch.full((1, 3, 12, 12), x), torch.full((1, 3, 12, 12), y)).item() == pytest.approx(
        expected, abs=1e-5
    )


def test_autocast_does_not_coarsen_them():
    restored, target = noisy_pair()
    with torch.autocast("cpu", torch.bfloat16):
        inside = ssim(restored, target)
    assert torch.equal(inside, ssim(restored, target))


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_bad_input_is_refused(metric):
    good = torch.rand(1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"\(1, 3, 16, 15\).*\(1, 3, 16, 16\)"):
        metric(good[..., :15], good)
    with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
        metric(good[0], good[0])
    with pytest.raises(ValueError, match="uint8"):
        metric((good * 255).byte(), (good * 255).byte())


def test_ssim_needs_room_for_its_window():
    with pytest.raises(ValueError, match="11 x 11.*16 x 10: leave out"):
        ssim(torch.rand(1, 3, 16, 10), torch.rand(1, 3, 16, 10))
