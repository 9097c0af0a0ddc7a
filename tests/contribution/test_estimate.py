"""FAIG and the probe: completeness first, then values, restoration to the bit, the memory law and the errors."""

import gc
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.estimate import assert_same, faig, linear_pair, mse, probe, restorer_task, snapshot
from torch import nn

from colora_peft import ProbeSettings

pytestmark = pytest.mark.filterwarnings("ignore:The loss does not reach")


@pytest.fixture(autouse=True)
def one_thread():
    """Images this small only wait for threads, badly so beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_path_steps", [1, 2, 7])
def test_completeness_is_exact_for_a_quadratic_loss(num_path_steps):
    model, end, batches = linear_pair()
    result = faig(model, end, batches, mse, num_path_steps)
    assert result.completeness_error < 1e-5
    assert (result.method, result.num_path_steps, result.num_batches) == ("faig", num_path_steps, 3)


def test_a_score_worked_out_by_hand():
    # y = w x with x = (1, 2); loss = sum of y squared; path from 0 to w: mean gradient is that at w / 2, x (w x).
    model = nn.Sequential(nn.Linear(2, 3, bias=False))
    nn.init.zeros_(model[0].weight)
    end = torch.tensor([[1.0, 0.0], [1.0, -1.0], [2.0, -1.0]])
    result = faig(model, {"0.weight": end}, [torch.tensor([[1.0, 2.0]])], lambda m, x: m(x).square().sum(), 3)
    # Filters: (w x)^2 = 1, 1, 0; six weights.
    assert result.scores == pytest.approx({"0": 2 / 6})
    assert (result.loss_start, result.loss_end, result.path_integral) == pytest.approx((0.0, 2.0, 2.0))


def test_signs_cancel_within_a_filter_but_not_between_filters():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    nn.init.zeros_(model[0].weight)
    slopes = torch.tensor([[1.0, 1.0], [3.0, 0.0]])
    end = torch.tensor([[1.0, -1.0], [-1.0, 5.0]])
    result = faig(model, {"0.weight": end}, [slopes], lambda m, s: (m[0].weight * s).sum(), 2)
    assert result.scores["0"] == pytest.approx(3 / 4) and result.path_integral == pytest.approx(-3.0)


def test_unmoved_and_unreached_layers_score_zero():
    model, batches = restorer_task()
    end = {name: value.clone() for name, value in model.state_dict().items()}
    for layer in ("intro", "unused", "ending"):
        end[f"{layer}.weight"] += 0.1
    scores = faig(model, end, batches, mse).scores
    assert list(scores) == ["intro", "expand", "depthwise", "attention", "project", "unused", "ending"]
    assert scores["intro"] > 0 and scores["ending"] > 0
    assert [scores[name] for name in ("expand", "depthwise", "attention", "project", "unused")] == [0.0] * 5


def test_completeness_within_two_percent_at_the_default_steps():
    model, batches = restorer_task()
    result = probe(model, batches, mse, ProbeSettings(learning_rate=2e-3))
    assert result.method == "probe" and result.loss_end < 0.7 * result.loss_start
    assert result.completeness_error < 0.02
    # The probe's loss at the end is another function's than the mean of the two batches, so midpoints must matter.
    coarse = ProbeSettings(learning_rate=2e-3, num_path_steps=1)
    assert probe(model, batches, mse, coarse).completeness_error > 1e-4


def test_completeness_on_nafnet_within_two_percent():
    models = pytest.importorskip("colora_peft.models")
    torch.manual_seed(0)
    config = models.NAFNetConfig(width=8, encoder_blocks=(1, 1), middle_blocks=1, decoder_blocks=(1, 1))
    model = models.NAFNetForImageRestoration(config)
    targets = [torch.rand(2, 3, 6, 6).repeat_interleave(4, 2).repeat_interleave(4, 3) for _ in range(2)]
    batches = [(0.3 + 0.5 * target, target) for target in targets]

    def loss_fn(model, batch):
        return model(batch[0], labels=batch[1]).loss

    assert probe(model, batches, loss_fn, ProbeSettings(learning_rate=1e-3)).completeness_error < 0.02
    tuned = models.NAFNetForImageRestoration(config)
    tuned.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-3)
    for step in range(80):
        loss_fn(tuned, batches[step % 2]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert faig(model, tuned.state_dict(), batches, loss_fn).completeness_error < 0.02


@pytest.mark.parametrize("estimate", ["faig", "probe"])
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_restored_to_the_bit(estimate, fails):
    model, batches = restorer_task(with_batch_norm=True, dropout=0.5)
    model.norm.eval()
    model.intro.weight.requires_grad_(False)
    model.ending.weight.grad = torch.rand_like(model.ending.weight)
    end = {name: value + 0.1 for name, value in model.state_dict().items()}
    calls = []

    def disturbing_loss(model, batch):
        calls.append(1)
        model.train()
        torch.rand(3), random.random(), np.random.rand()
        if fails and len(calls) == 3:
            raise RuntimeError("third call")
        return mse(model, batch)

    before = snapshot(model)

    def score():
        if estimate == "faig":
            return faig(model, end, batches, disturbing_loss, num_path_steps=2)
        return probe(model, batches, disturbing_loss, ProbeSettings(num_path_steps=2))

    if fails:
        with pytest.raises(RuntimeError, match="third call"):
            score()
    else:
        with torch.no_grad():
            score()
    assert_same(before, snapshot(model))


def test_same_seed_same_scores_also_with_dropout_and_shuffling():
    model, batches = restorer_task(num_batches=3)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, shuffle=True)

    def noisy_loss(model, batch):
        return mse(model, (batch[0] + 0.05 * torch.randn(batch[0].shape), batch[1]))

    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(probe(model, loader, noisy_loss, ProbeSettings(num_steps=5, learning_rate=1e-3)))
    first, again, other = (result.scores for result in results)
    assert first == again and first != other
    # Noise is drawn alike at each point of the path, so that the law holds with it.
    assert results[0].completeness_error < 0.01


def test_frozen_parameters_move_along():
    model, end, batches = linear_pair()
    free = faig(model, end, batches, mse, 2)
    model.requires_grad_(False)
    frozen = faig(model, end, batches, mse, 2)
    assert replace(frozen, seconds=0.0) == replace(free, seconds=0.0)


def test_autocast_around_the_call_sees_each_point_of_the_path():
    model, end, batches = linear_pair()
    exact = faig(model, end, batches, mse, 4)
    with torch.autocast("cpu", torch.bfloat16):
        model(batches[0][0])  # fills autocast's cache of low-precision weights
        rounded = faig(model, end, batches, mse, 4)
    assert rounded.loss_end == pytest.approx(exact.loss_end, rel=0.05)
    assert rounded.scores["0"] == pytest.approx(exact.scores["0"], rel=0.05)


def test_weights_in_half_precision_are_summed_in_full():
    model, end, batches = linear_pair()
    exact = faig(model, end, batches, mse, 4)
    batches = [(x.bfloat16(), target.bfloat16()) for x, target in batches]
    rounded = faig(model.bfloat16(), end, batches, mse, 4)
    assert rounded.scores["0"] == pytest.approx(exact.scores["0"], rel=0.05)


def test_memory_depends_neither_on_batches_nor_on_steps():
    def most_live_weights(num_batches, num_path_steps):
        """The largest number of tensors as large as the weight that are alive when the loss is called."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(37, 41, bias=False))
        end = {"0.weight": torch.randn(41, 37)}
        counts = []

        def counting_loss(model, x):
            counts.append(
                sum(type(o) in (torch.Tensor, nn.Parameter) and o.numel() == 37 * 41 for o in gc.get_objects())
            )
            return model(x).square().mean()

        faig(model, end, [torch.randn(1, 37)] * num_batches, counting_loss, num_path_steps)
        return max(counts)

    gc.collect()
    smallest = most_live_weights(1, 1)
    assert smallest == most_live_weights(6, 1) == most_live_weights(2, 7)
