"""PSNR over whole images, and the images that are shown."""

import math
import sys

import pytest
import torch
from torch import nn

from colora_peft import restoration_loss, restore_image
from colora_peft.evaluation.evaluate import evaluate, restore_some
from colora_peft.inference import local_pooling


class Shift(nn.Module):
    """Adds a constant, and noise in training mode: a network that forgot to leave it would show."""

    def __init__(self, amount):
        super().__init__()
        self.amount = nn.Parameter(torch.tensor(amount))
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.BatchNorm2d(3).eval()

    def forward(self, x):
        return self.dropout(x + self.amount)


class Pairs:
    """Grey images of 12 x 16; input and target differ by `gaps[index]`."""

    def __init__(self, gaps, level=0.2):
        self.gaps = gaps
        self.level = level
        self.names = [str(index) for index in range(len(gaps))]

    def __len__(self):
        return len(self.gaps)

    def __getitem__(self, index):
        degraded = torch.full((3, 12, 16), self.level)
        return degraded, degraded + self.gaps[index]


def run(model, pairs):
    return evaluate(model, pairs, torch.device("cpu"), "test")


def test_psnr_is_the_mean_over_the_images():
    # Levels of 8 bits, so that rounding changes nothing: the input is 51, the targets 102 and 153, the output 76.
    scores = run(Shift(25 / 255), Pairs([51 / 255, 102 / 255]))
    psnr, of_input = ([20 * math.log10(255 / gap) for gap in gaps] for gaps in ((26, 77), (51, 102)))
    assert scores["psnr"] == pytest.approx(sum(psnr) / 2, abs=1e-3)
    assert scores["psnr_input"] == pytest.approx(sum(of_input) / 2, abs=1e-3)


class Watched(Shift):
    """Keeps the sizes of what it is given."""

    def __init__(self, amount):
        super().__init__(amount)
        self.sizes = set()

    def forward(self, x):
        self.sizes.add(tuple(x.shape[2:]))
        return super().forward(x)


def test_large_images_are_measured_in_tiles_and_others_at_once(monkeypatch):
    model, gradient = Watched(0.1), torch.linspace(0, 0.8, 700).expand(3, 600, 700)
    pairs = [(gradient, gradient + 0.15)]
    whole = run(model, pairs), restore_some(model, pairs, 1)[0][1]
    assert model.sizes == {(600, 700)}
    model.sizes.clear()
    # Not by its name: in the package, `evaluate` is the function.
    monkeypatch.setattr(sys.modules["colora_peft.evaluation.evaluate"], "WHOLE_UP_TO_PX", 600 * 700 - 1)
    tiled = run(model, pairs), restore_some(model, pairs, 1)[0][1]
    assert max(map(max, model.sizes)) <= 512
    assert tiled[0] == pytest.approx(whole[0], abs=1e-3)
    torch.testing.assert_close(tiled[1], whole[1])


class Pooling(Shift):
    """Adds the mean over the image."""

    def __init__(self):
        super().__init__(0.1)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        return super().forward(x) + self.pool(x)


@pytest.mark.parametrize("limit", [1, 600 * 700], ids=["in-tiles", "at-once"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_figures_are_nan_where_the_network_returns_no_numbers(monkeypatch, limit, value):
    monkeypatch.setattr(sys.modules["colora_peft.evaluation.evaluate"], "WHOLE_UP_TO_PX", limit)
    pairs = [(torch.zeros(3, 600, 700), torch.zeros(3, 600, 700))]
    assert math.isnan(run(Shift(value), pairs)["psnr"])


def test_large_images_are_measured_inside_local_pooling(monkeypatch):
    monkeypatch.setattr(sys.modules["colora_peft.evaluation.evaluate"], "WHOLE_UP_TO_PX", 1)
    model = Pooling()
    with local_pooling(model, window=16):
        assert math.isfinite(evaluate(model, [(torch.zeros(3, 40, 40),) * 2], torch.device("cpu"), "")["psnr"])


def test_perfect_network_scores_highest():
    scores = run(Shift(51 / 255), Pairs([51 / 255]))
    assert scores.keys() == {"psnr", "ssim", "psnr_input", "ssim_input"}
    assert scores["psnr"] == 100
    assert scores["ssim"] == pytest.approx(1)
    assert scores["ssim_input"] < 0.9


@pytest.mark.parametrize("use", [run, lambda model, pairs: restore_some(model, pairs, 1)])
@pytest.mark.parametrize("training", [True, False])
def test_network_keeps_its_modes_and_weights(use, training):
    model = Shift(0.1).train(training)
    model.frozen.eval()
    use(model, Pairs([0.1]))
    assert (model.training, model.dropout.training, model.frozen.training) == (training, training, False)
    assert model.amount.grad is None
    assert model.amount.item() == pytest.approx(0.1)


def test_modes_come_back_after_an_error():
    model = Shift(0.1).train()
    with pytest.raises(IndexError):
        run(model, type("Broken", (Pairs,), {"__len__": lambda pairs: 2})([0.1]))
    assert model.training


@pytest.mark.parametrize(
    ("length", "count", "shown"), [(9, 3, [0, 4, 8]), (5, 5, [0, 1, 2, 3, 4]), (2, 4, [0, 1]), (4, 1, [0])]
)
def test_shown_images_are_spread_over_the_set(length, count, shown):
    rows = restore_some(Shift(0.1), Pairs([index / 100 for index in range(length)]), count)
    gaps = [(target - degraded).mean().item() * 100 for degraded, _, target in rows]
    assert gaps == pytest.approx(shown, abs=1e-3)


def test_shown_images_are_restored_and_in_range():
    ((degraded, restored, target),) = restore_some(Shift(0.9), Pairs([0.5]), 1)
    assert degraded.shape == restored.shape == target.shape == (3, 12, 16)
    assert torch.equal(restored, torch.ones(3, 12, 16))  # 0.2 + 0.9, clamped
    ((_, restored, _),) = restore_some(Shift(0.3), Pairs([0.5]), 1)
    torch.testing.assert_close(restored, torch.full((3, 12, 16), 0.5))


class Late(nn.Module):
    """Makes a constant at its first use and keeps it, as many networks do with masks and positions."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool, self.factor = nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), None

    def forward(self, x):
        if self.factor is None:
            self.factor = torch.full((1, 3, 1, 1), 0.5, device=x.device)
        return self.conv(x) * self.factor + self.pool(x)


def pool_locally(model):
    with local_pooling(model, window=4):
        pass


FIRST_USES = {
    "evaluate": lambda model: evaluate(model, Pairs([0.1]), torch.device("cpu"), ""),
    "restore_some": lambda model: restore_some(model, Pairs([0.1]), 1),
    "restore_image": lambda model: restore_image(model, torch.full((3, 24, 24), 0.3), tile=16, overlap=4),
    "local_pooling": pool_locally,
}


@pytest.mark.parametrize("use", FIRST_USES.values(), ids=FIRST_USES)
def test_a_network_that_was_first_used_here_can_be_trained(use):
    torch.manual_seed(0)
    model, untouched = Late().train(), Late().train()
    untouched.load_state_dict(model.state_dict())
    state = torch.get_rng_state()
    use(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and not any(module._forward_hooks for module in model.modules())
    batch = {"pixel_values": torch.rand(2, 3, 8, 8), "labels": torch.rand(2, 3, 8, 8)}
    for each in (model, untouched):
        restoration_loss(each, batch).backward()
    assert torch.equal(model.conv.weight.grad, untouched.conv.weight.grad)
