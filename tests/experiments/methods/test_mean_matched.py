"""Mean-matched PSNR: constant errors of colour vanish, all others stay."""

import pytest
import torch
from torch import nn

from examples.experiments.methods.mean_matched import mean_matched, psnr_mean_matched


class Shifted(nn.Module):
    """Returns the image with a constant added to each channel."""

    def __init__(self, *by: float):
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by)[:, None, None])

    def forward(self, image):
        return image + self.by


def pairs(count=2):
    generator = torch.Generator().manual_seed(0)
    targets = [0.3 + 0.4 * torch.rand(3, 16, 24, generator=generator) for _ in range(count)]
    return [(target + 0.05 * torch.randn(3, 16, 24, generator=generator), target) for target in targets]


def test_a_matched_image_has_the_means_of_its_target_and_its_own_differences():
    image, target = torch.rand(2, 3, 5, 7), torch.rand(2, 3, 5, 7)
    matched = mean_matched(image, target)
    torch.testing.assert_close(matched.mean((-2, -1)), target.mean((-2, -1)))
    torch.testing.assert_close(matched - matched[..., :1, :1], image - image[..., :1, :1])


def test_a_network_that_only_shifts_colours_is_as_good_as_its_input():
    found = psnr_mean_matched(Shifted(0.2, -0.1, 0.05), pairs(), torch.device("cpu"))
    assert found["psnr_mean_matched"] == pytest.approx(found["psnr_input_mean_matched"], abs=0.01)
    assert 25 < found["psnr_mean_matched"] < 27, "noise of 0.05 has 26 dB"


def test_the_network_is_in_evaluation_mode_meanwhile_and_as_before_afterwards():
    network = nn.Sequential(Shifted(0.0, 0.0, 0.0), nn.Dropout(0.9)).train()
    found = psnr_mean_matched(network, pairs(1), torch.device("cpu"))
    assert found["psnr_mean_matched"] == found["psnr_input_mean_matched"] and network[1].training
