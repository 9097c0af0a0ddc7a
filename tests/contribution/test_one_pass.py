"""Gradient, Fisher and Taylor: against plain autograd, then what holds for every estimator."""

import random
import warnings

import numpy as np
import pytest
import torch
from support.estimate import SmallRestorer, assert_same, linear_pair, mse, restorer_task, snapshot
from support.tiny_networks import NETWORKS, network
from torch import nn

from colora_peft import ESTIMATORS, FaigSettings, ProbeSettings, adaptable_layers, estimate_contributions
from colora_peft.contribution.one_pass import ONE_PASS_ESTIMATORS

QUICK = {"faig": FaigSettings(2), "probe": ProbeSettings(num_steps=3, num_path_steps=2)}

all_estimators = pytest.mark.parametrize("estimator", ESTIMATORS)
one_pass_estimators = pytest.mark.parametrize("estimator", ONE_PASS_ESTIMATORS)


def estimate(model, batches, loss_fn, estimator, **options):
    """With few steps, and for "faig" towards weights that lie a little beside."""
    if estimator == "faig":
        generator = torch.Generator().manual_seed(1)
        options["end_state"] = {
            name: value + 0.05 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
            for name, value in model.state_dict().items()
        }
    return estimate_contributions(model, batches, loss_fn, estimator, settings=QUICK.get(estimator), **options)


def task_of(name, num_batches=3):
    """A network with every kind of layer that the name's network has, and batches for `mse`."""
    model, x = network(name)
    return model.eval(), [(torch.rand(x.shape), torch.rand(x.shape)) for _ in range(num_batches)]


def gradients_by_batch(model, batches):
    """Layer name -> its weight's gradient for each batch, by plain autograd."""
    layers = adaptable_layers(model)
    weights = [layer.weight for layer in layers.values()]
    found = [torch.autograd.grad(mse(model, batch), weights) for batch in batches]
    return {name: [gradients[index] for gradients in found] for index, name in enumerate(layers)}


@pytest.mark.parametrize("name", list(NETWORKS))
def test_scores_are_those_of_plain_autograd(name):
    model, batches = task_of(name)
    assert any(getattr(layer, "groups", 1) > 1 for layer in model.modules()) or name == "sequence"
    by_hand = {estimator: {} for estimator in ONE_PASS_ESTIMATORS}
    for layer, gradients in gradients_by_batch(model, batches).items():
        weight = model.get_submodule(layer).weight.detach()
        mean = sum(gradients) / len(gradients)
        by_hand["gradient"][layer] = mean.abs().mean().item()
        by_hand["fisher"][layer] = torch.stack(gradients).square().mean().item()
        filters = [(weight[j] * mean[j]).sum().abs() for j in range(weight.shape[0])]
        by_hand["taylor"][layer] = (sum(filters) / weight.numel()).item()
    for estimator, expected in by_hand.items():
        result = estimate(model, batches, mse, estimator)
        assert list(result.scores) == list(adaptable_layers(model))
        assert result.scores == pytest.approx(expected, rel=1e-5)
        assert min(expected.values()) > 0
        assert (result.method, result.num_batches, result.unreached) == (estimator, 3, ())
        assert result.loss_start == pytest.approx(sum(mse(model, batch).item() for batch in batches) / 3)
        assert result.completeness_error is None and result.loss_end is None and result.num_path_steps is None


def test_gradient_is_the_limit_of_a_probe_of_one_step():
    model, batches = task_of("restorer", num_batches=1)
    scores = estimate_contributions(model, batches, mse, "gradient").scores
    rate = 1e-6
    settings = ProbeSettings(num_steps=1, learning_rate=rate, num_path_steps=1)
    probe = estimate_contributions(
        model.double(), [tuple(x.double() for x in batches[0])], mse, "probe", settings=settings
    )
    assert {name: score / rate for name, score in probe.scores.items()} == pytest.approx(scores, rel=1e-2)


def test_taylor_is_the_loss_lost_with_a_filter_where_the_loss_is_linear():
    model, _ = task_of("sequence")

    def linear_loss(model, slopes):
        return (model.body.weight * slopes).sum()

    slopes = torch.randn(5, 5)
    losses = []
    for j in range(5):
        without = slopes.clone()
        without[j] = 0
        losses.append(abs((linear_loss(model, slopes) - linear_loss(model, without)).item()))
    with pytest.warns(UserWarning, match="does not reach 2 of 3"):
        result = estimate_contributions(model, [slopes], linear_loss, "taylor")
    assert result.scores["body"] == pytest.approx(sum(losses) / 25, rel=1e-5)


def test_weights_of_zero_have_no_taylor_score_but_a_gradient():
    model, batches = task_of("restorer")
    nn.init.zeros_(model.blocks[0].mix.weight)
    for estimator in ONE_PASS_ESTIMATORS:
        with warnings.catch_warnings():  # behind these weights, another layer has no gradient
            warnings.simplefilter("ignore")
            score = estimate(model, batches, mse, estimator).scores["blocks.0.mix"]
        assert (score == 0.0) == (estimator == "taylor")


@pytest.mark.parametrize(("estimator", "power"), [("gradient", 1), ("taylor", 1), ("fisher", 2), ("faig", 1)])
def test_scores_follow_the_unit_of_the_loss(estimator, power):
    model, batches = task_of("restorer")
    plain = estimate(model, batches, mse, estimator).scores
    larger = estimate(model, batches, lambda model, batch: -8 * mse(model, batch), estimator).scores
    assert larger == pytest.approx({name: 8**power * score for name, score in plain.items()}, rel=1e-5)


@one_pass_estimators
def test_order_of_batches_does_not_matter(estimator):
    model, batches = task_of("restorer", num_batches=5)
    scores = estimate(model, batches, mse, estimator).scores
    assert estimate(model, batches[::-1], mse, estimator).scores == pytest.approx(scores, rel=1e-5)
    assert estimate(model, batches * 2, mse, estimator).scores == pytest.approx(scores, rel=1e-5)
    assert estimate(model, batches[:1], mse, estimator).scores != pytest.approx(scores, rel=1e-2)


@all_estimators
def test_frozen_layers_and_training_mode_make_no_difference(estimator):
    model, batches = restorer_task(with_batch_norm=True, dropout=0.5)
    model.unused = nn.Identity()
    results = []
    for training, free in ((False, True), (True, True), (True, False)):
        model.train(training).requires_grad_(free)
        torch.manual_seed(0)
        results.append(estimate(model, batches, mse, estimator).scores)
        assert model.training == model.dropout.training == training
        assert all(parameter.requires_grad == free for parameter in model.parameters())
    assert results[0] == results[1] == results[2]
    assert min(results[0].values()) > 0


@all_estimators
def test_same_seed_same_scores_and_another_seed_others(estimator):
    model, batches = task_of("restorer")

    def noisy_loss(model, batch):
        return mse(model, (batch[0] + 0.1 * torch.randn(batch[0].shape), batch[1]))

    scores = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        scores.append(estimate(model, batches, noisy_loss, estimator).scores)
    assert scores[0] == scores[1] != scores[2]


@all_estimators
def test_everything_is_restored_after_an_exception_at_any_call(estimator):
    model, batches = restorer_task(with_batch_norm=True, dropout=0.5)
    model.unused = nn.Identity()
    model.intro.weight.requires_grad_(False)
    model.ending.weight.grad = torch.rand_like(model.ending.weight)
    calls, fails_at = 0, None

    def loss_fn(model, batch):
        nonlocal calls
        calls += 1
        model.train()
        torch.rand(3), random.random(), np.random.rand()
        loss = mse(model, batch)
        if calls == fails_at:
            raise RuntimeError("as planned")
        return loss

    before = snapshot(model)
    estimate(model, batches, loss_fn, estimator)
    assert_same(before, snapshot(model))
    num_calls = calls
    assert num_calls >= len(batches)
    for call in range(1, num_calls + 1):
        calls, fails_at = 0, call
        with pytest.raises(RuntimeError, match="as planned"):
            estimate(model, batches, loss_fn, estimator)
        assert_same(before, snapshot(model))


@all_estimators
def test_layers_that_the_loss_never_reaches_are_named(estimator):
    model, batches = restorer_task()
    with pytest.warns(UserWarning, match="does not reach 1 of 7 layers, whose score is 0: 'unused'"):
        result = estimate(model, batches, mse, estimator)
    assert result.unreached == ("unused",) and result.scores["unused"] == 0
    assert min(score for name, score in result.scores.items() if name != "unused") > 0


def test_a_layer_that_one_batch_reaches_is_reached(recwarn):
    """Also where its gradients cancel in the sum."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    slopes = torch.randn(3, 3)

    def loss_fn(model, sign):
        return (model[1].weight * slopes * sign).sum() + model[0].weight.square().sum()

    result = estimate_contributions(model, [1.0, -1.0, 0.0], loss_fn, "gradient")
    assert result.scores["1"] == 0 and result.unreached == ()
    assert not [warning for warning in recwarn if "does not reach" in str(warning.message)]


@all_estimators
def test_a_loss_that_reaches_no_layer_is_refused(estimator):
    model, batches = task_of("sequence")
    extra = nn.Parameter(torch.ones(1))
    model.register_parameter("extra", extra)
    with pytest.raises(ValueError, match="reaches none of the 3 layers"):
        estimate(model, batches, lambda model, batch: model.extra.sum(), estimator)


@all_estimators
@pytest.mark.parametrize("where", ["in the loss", "around the call"])
def test_autocast_changes_the_last_digits_only(estimator, where):
    from accelerate import Accelerator

    model, batches = restorer_task()
    model.unused = nn.Identity()
    accelerator = Accelerator(cpu=True)
    exact = estimate(model, batches, mse, estimator).scores

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    def loss_fn(model, batch):
        if where == "around the call":
            return mse(model, batch)
        with accelerator.autocast(), autocast():
            output = model(batch[0])
        return nn.functional.mse_loss(output.float(), batch[1])

    if where == "around the call":
        with autocast():
            rounded = estimate(model, batches, loss_fn, estimator).scores
    else:
        rounded = estimate(model, batches, loss_fn, estimator).scores
    assert rounded != exact
    # A probe of few steps rounds the sign of gradients that are near 0.
    assert rounded == pytest.approx(exact, rel=0.3, abs=0.1 * max(exact.values()))


@one_pass_estimators
def test_a_generator_is_enough_for_one_pass(estimator):
    model, batches = task_of("restorer")
    generator = (batch for batch in batches)
    assert estimate(model, generator, mse, estimator).scores == estimate(model, batches, mse, estimator).scores
    with pytest.raises(ValueError, match="an empty iterator, perhaps one that was used up"):
        estimate(model, generator, mse, estimator)


@all_estimators
def test_progress_is_shown_on_request_only(estimator, capfd):
    model, batches = task_of("sequence")
    estimate(model, batches, mse, estimator)
    assert capfd.readouterr().err == ""
    estimate(model, batches, mse, estimator, progress=True)
    assert {"faig": "FAIG path", "probe": "probe"}.get(estimator, estimator) in capfd.readouterr().err


def test_settings_are_recorded():
    model, end, batches = linear_pair()
    settings = ProbeSettings(num_steps=4, learning_rate=1e-2, num_path_steps=3)
    result = estimate_contributions(model, batches, mse, "probe", settings=settings)
    assert (result.method, result.num_tuning_steps, result.tuning_learning_rate) == ("probe", 4, 1e-2)
    assert (result.num_path_steps, result.num_batches, result.num_processes) == (3, 3, 1) and result.seconds > 0
    result = estimate_contributions(model, batches, mse, "faig", end_state=end)
    assert (result.method, result.num_path_steps, result.num_tuning_steps) == ("faig", 16, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"estimator": "hessian"}, "estimator is 'hessian': choose one of " + ", ".join(ESTIMATORS)),
        ({"estimator": "faig"}, "'faig' needs end_state"),
        ({"estimator": "taylor", "end_state": {}}, "'taylor' takes no end_state"),
        ({"estimator": "taylor", "settings": ProbeSettings()}, "'taylor' are ProbeSettings: it has none"),
        ({"estimator": "probe", "settings": FaigSettings()}, "'probe' are FaigSettings: pass ProbeSettings"),
    ],
)
def test_what_does_not_belong_together_is_said(arguments, message):
    model, _, batches = linear_pair()
    with pytest.raises(ValueError, match=message):
        estimate_contributions(model, batches, mse, **arguments)


@all_estimators
@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda model, batch: model(batch[0]), r"a tensor of shape \(6, 4\)"),
        (lambda model, batch: 1.0, "a float for"),
        (lambda model, batch: mse(model, batch) * torch.inf, "The loss is inf for"),
        (lambda model, batch: mse(model, batch).detach(), "has no gradient"),
    ],
)
def test_every_estimator_names_a_loss_that_cannot_be_used(estimator, loss_fn, message):
    model, _, batches = linear_pair()
    with pytest.raises(ValueError, match=message):
        estimate(model, batches, loss_fn, estimator)


@all_estimators
def test_every_estimator_says_that_there_are_no_batches(estimator):
    model, _, _ = linear_pair()
    with pytest.raises(ValueError, match="`batches` are empty"):
        estimate(model, [], mse, estimator)
    with pytest.raises(ValueError, match="empty iterator|cannot be iterated again"):
        estimate(model, iter([]), mse, estimator)
    with pytest.raises(ValueError, match="`batches` are a int"):
        estimate(model, 3, mse, estimator)


def test_a_wrapped_model_is_refused():
    with pytest.raises(ValueError, match="DataParallel.*unwrap_model"):
        estimate_contributions(nn.DataParallel(SmallRestorer()), [1], mse, "gradient")


@one_pass_estimators
def test_memory_does_not_grow_with_the_batches(estimator):
    import gc

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(37, 41, bias=False))

    def most_live_weights(num_batches):
        counts = []

        def counting_loss(model, x):
            kinds = (torch.Tensor, nn.Parameter)
            counts.append(sum(type(o) in kinds and o.numel() == 37 * 41 for o in gc.get_objects()))
            return model(x).square().mean()

        estimate(model, (torch.randn(1, 37) for _ in range(num_batches)), counting_loss, estimator)
        return max(counts)

    gc.collect()
    assert most_live_weights(2) == most_live_weights(7)
