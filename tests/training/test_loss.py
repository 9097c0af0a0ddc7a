"""The training loss: its second term sees the pattern that repeats, that alone, and takes it off."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from support.loop import NoisyPatches, assert_equal, nafnet, plain, rows, run
from torch import nn

from colora_peft import CoLoRAConfig
from colora_peft.inference import tile_multiple
from colora_peft.models import NAFNetConfig, NAFNetForImageRestoration
from colora_peft.training.loss import TrainingLoss, centred_cells, checkerboard, checkerboard_obstacle


def pattern(period, generator):
    one = torch.randn(3, period, period, generator=generator)
    return one - one.mean((-2, -1), keepdim=True)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("size", [(16, 24), (19, 30)])
def test_the_checkerboard_is_the_pattern_that_each_image_repeats_whatever_its_colour(generator, size):
    own = torch.stack([pattern(4, generator), pattern(4, generator)])
    images = own.tile(8, 8)[..., : size[0], : size[1]] + torch.randn(2, 3, 1, 1, generator=generator)
    torch.testing.assert_close(checkerboard(images, 4), own, atol=1e-5, rtol=1e-4)


def test_a_finer_pattern_is_part_of_a_coarser_one_and_not_the_other_way_round(generator):
    fine, coarse = pattern(2, generator), pattern(8, generator).tile(2, 2)
    torch.testing.assert_close(checkerboard(fine.tile(16, 16)[None], 8), fine.tile(4, 4)[None], atol=1e-5, rtol=1e-4)
    assert checkerboard(coarse[None], 2).abs().mean() < coarse.abs().mean() / 2


def test_what_does_not_repeat_averages_out(generator):
    few, many = (
        checkerboard(torch.randn(4, 3, side, side, generator=generator), 8).std().item() for side in (64, 256)
    )
    assert few == pytest.approx(1 / 8, rel=0.1) and many == pytest.approx(1 / 32, rel=0.1)


def test_centred_cells_little_else_tell_the_pattern(generator):
    """With weights by the inverse variance, half an image of noise does no harm to the other half."""
    own = pattern(4, generator) / 100
    image = own.tile(16, 16) + torch.tensor([0.01, 1.0]).repeat_interleave(32) * torch.randn(
        3, 64, 64, generator=generator
    )
    plain_mean = centred_cells(image[None], 4).mean(2).unflatten(-1, (4, 4))
    errors = [(found - own).square().mean().sqrt() for found in (checkerboard(image[None], 4), plain_mean)]
    assert errors[0] < 2 * 0.01 / 128**0.5 and errors[1] > 20 * errors[0]


def test_a_pattern_in_half_of_the_cells_counts_for_half(generator):
    """Its own variance must not be taken for noise, or the cells without it would speak for all."""
    own = pattern(4, generator) / 50
    image = own.tile(16, 16) * torch.tensor([0.0, 1.0]).repeat_interleave(32)
    image += torch.randn(3, 64, 64, generator=generator) / 1000
    torch.testing.assert_close(checkerboard(image[None], 4)[0], own / 2, atol=0.001, rtol=0)


@pytest.mark.parametrize("period", [2, 4, 8])
def test_noise_around_a_weak_pattern_leaves_its_strength(generator, period):
    own = pattern(period, generator) / 100
    image = own.tile(512 // period, 512 // period) + torch.randn(3, 512, 512, generator=generator) / 20
    strength = (checkerboard(image[None], period)[0] * own).sum() / own.square().sum()
    assert strength == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_of_a_network_loses_nothing_in_the_sums(generator, dtype):
    restored, target = torch.rand(2, 2, 3, 64, 64, generator=generator)
    restored = restored.to(dtype)
    expected = TrainingLoss(3.0, 4)(restored.double(), target.double())
    torch.testing.assert_close(TrainingLoss(3.0, 4)(restored, target).double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(checkerboard(restored, 4), checkerboard(restored.float(), 4))


def test_flat_cells_do_not_count_for_all(generator):
    image = torch.randn(1, 3, 32, 32, generator=generator) / 255
    image[..., :4, :4] = 0
    assert checkerboard(image, 4).std() == pytest.approx(1 / 255 / 8, rel=0.2)


@pytest.mark.parametrize(("period", "side"), [(8, 31), (16, 63), (64, 32)])
def test_there_is_none_without_four_cells_a_side(generator, period, side):
    found = checkerboard(torch.randn(1, 3, side, 64, generator=generator), period)
    assert found.shape == (1, 3, period, period) and not found.any()


def test_the_loss_is_the_mean_absolute_error_plus_the_weighted_checkerboard(generator):
    restored, target = torch.rand(2, 2, 3, 16, 16, generator=generator)
    l1 = F.l1_loss(restored, target)
    assert torch.equal(TrainingLoss(0.0, 4)(restored, target), l1)
    term = checkerboard(restored - target, 4).abs().mean()
    torch.testing.assert_close(TrainingLoss(3.0, 4)(restored, target), l1 + 3 * term)


def test_the_loss_of_a_batch_is_the_mean_over_its_images(generator):
    restored, target = torch.rand(2, 6, 3, 16, 16, generator=generator)
    loss = TrainingLoss(3.0, 4)
    single = torch.stack([loss(*pair) for pair in zip(restored.split(1), target.split(1), strict=True)])
    torch.testing.assert_close(loss(restored, target), single.mean())


def test_the_term_takes_the_checkerboard_off_and_nothing_else(generator):
    """A bias for each place in a cell is what PixelShuffle can add; its mean is a colour, which the term leaves."""
    layer = nn.Sequential(nn.Conv2d(3, 12, 2, stride=2), nn.PixelShuffle(2))
    bias = torch.randn(12, generator=generator)
    with torch.no_grad():
        layer[0].weight.copy_(torch.eye(12).reshape(3, 2, 2, 12).permute(3, 0, 1, 2))
        layer[0].bias.copy_(bias)
    optimizer = torch.optim.SGD([layer[0].bias], lr=0.1)
    target = torch.rand(4, 3, 32, 32, generator=generator)
    for _ in range(400):
        optimizer.zero_grad()
        checkerboard(layer(target) - target, 2).abs().mean().backward()
        optimizer.step()
    means = bias.view(3, 4).mean(1, keepdim=True)
    torch.testing.assert_close(layer[0].bias.view(3, 4), means.expand(3, 4), atol=0.02, rtol=0)


def test_the_period_of_nafnet_is_that_of_what_it_makes_of_a_constant():
    config = NAFNetConfig(width=4, encoder_blocks=[1, 1], middle_blocks=1, decoder_blocks=[1, 1])
    network = NAFNetForImageRestoration(config).eval()
    assert tile_multiple(network) == 4
    constant = torch.full((1, 3, 48, 48), 0.5)
    with torch.no_grad():
        for layer in (*(up[0] for up in network.ups), network.ending):
            layer.weight.normal_(generator=torch.Generator().manual_seed(0))
        inner = (network(constant).reconstruction - constant)[..., 16:32, 16:32]
    assert checkerboard(inner, 4).abs().mean() > 1e-3
    torch.testing.assert_close(inner, inner[..., :4, :4].tile(4, 4))


# --- in a run --------------------------------------------------------------------------------------------------------


def adapted():
    torch.manual_seed(0)
    return get_peft_model(nafnet(levels=1), CoLoRAConfig(parameter_budget=0.3))


def test_a_run_trains_with_the_term_at_its_weight(tmp_path):
    losses, weights = [], []
    for weight in (0.0, 2.0, 4.0):
        folder = tmp_path / f"{weight:g}"
        weights.append(run(folder, adapted(), max_train_steps=1, checkerboard_weight=weight))
        losses.append(rows(folder)[0]["loss"])
    first, second = (after - losses[0] for after in losses[1:])
    assert first > 1e-4 and second == pytest.approx(2 * first, rel=1e-3)
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_run_with_the_term_goes_on_as_if_never_stopped(tmp_path):
    flags = {"checkerboard_weight": 5.0, "checkpointing_steps": 2, "checkpoints_total_limit": 0}
    expected = run(tmp_path / "whole", adapted(), **flags)
    parts = tmp_path / "parts"
    run(parts, adapted(), **flags)
    for step in (4, 6):
        shutil.rmtree(parts / f"checkpoint-{step}")
    assert_equal(run(parts, adapted(), resume_from_checkpoint="latest", **flags), expected)


@pytest.mark.parametrize("make", [plain, nafnet], ids=["no-period", "few-cells"])
def test_the_term_is_zero_where_nothing_repeats(tmp_path, make):
    weights = [run(tmp_path / f"{weight:g}", make(), NoisyPatches(), checkerboard_weight=weight) for weight in (0, 5)]
    assert_equal(*weights)


@pytest.mark.parametrize(("period", "resolution"), [(1, 64), (4, 15), (4, 16), (16, 63), (16, 64)])
def test_there_is_an_obstacle_exactly_where_the_term_is_zero(generator, period, resolution):
    restored, target = torch.rand(2, 1, 3, resolution, resolution, generator=generator)
    term = TrainingLoss(5.0, period)(restored, target) - (restored - target).abs().mean()
    assert (term == 0) == (checkerboard_obstacle(period, resolution) is not None)


def test_a_checkerboard_is_of_images_alone():
    with pytest.raises(ValueError, match=r"images \(B, C, H, W\), not of shape \(1, 3, 2, 8, 8\)"):
        checkerboard(torch.rand(1, 3, 2, 8, 8), 4)
