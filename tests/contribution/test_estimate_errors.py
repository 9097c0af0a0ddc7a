"""Refusals of the contribution estimators: each names the culprit and a remedy, before or after the walk."""

import pytest
import torch
from support.estimate import faig, linear_pair, mse, probe
from torch import nn

from colora_peft import ProbeSettings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda end: end.pop("0.bias"), r"missing: '0.bias'"),
        (lambda end: end.update({"module.1.weight": torch.ones(1)}), r"unexpected: 'module.1.weight'"),
        (lambda end: end.update({"0.weight": torch.ones(4, 6)}), r"'0.weight' has shape \(4, 6\).*\(4, 5\)"),
        (lambda end: end["0.weight"].fill_(torch.nan), "'0.weight' holds NaN"),
    ],
)
def test_end_weights_that_do_not_fit(change, message):
    model, end, batches = linear_pair()
    change(end)
    with pytest.raises(ValueError, match=message):
        faig(model, end, batches, mse)


def test_end_weights_equal_to_the_start():
    model, _, batches = linear_pair()
    with pytest.raises(ValueError, match="nothing moved"):
        faig(model, model.state_dict(), batches, mse)


def test_batches_must_be_there_at_every_pass():
    model, end, batches = linear_pair()
    for function, arguments in ((faig, (model, end)), (probe, (model,))):
        with pytest.raises(ValueError, match=r"^The `batches` are empty: pass at least one batch\.$"):
            function(*arguments, [], mse)
        with pytest.raises(ValueError, match="`batches` are a generator"):
            function(*arguments, (batch for batch in batches), mse)

    class Shrinking:
        remaining = 3

        def __iter__(self):
            Shrinking.remaining -= 1
            return iter(batches[: Shrinking.remaining])

    with pytest.raises(ValueError, match="2 on the first pass and 1 on a later"):
        faig(model, end, Shrinking(), mse)


def test_a_loader_that_drops_its_only_batch_is_told_so():
    model, end, batches = linear_pair()
    loader = torch.utils.data.DataLoader(batches, batch_size=4, drop_last=True)
    with pytest.raises(ValueError, match="empty: the loader drops the last batch.*lower its batch_size"):
        faig(model, end, loader, mse)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda model, batch: model(batch[0]), r"a tensor of shape \(6, 4\) for batch 0.*scalar"),
        (lambda model, batch: 1.0, "a float for"),
        (
            lambda model, batch: mse(model, batch) * torch.nan,
            r"^The loss is nan for batch 0 at the start weights: .*\.$",
        ),
        (
            lambda model, batch: mse(model, batch).detach(),
            r"^The loss for batch 0 at 0\.031 of the path has no gradient",
        ),
    ],
)
def test_losses_that_cannot_be_used(loss_fn, message):
    model, end, batches = linear_pair()
    with pytest.raises(ValueError, match=message):
        faig(model, end, batches, loss_fn)


def test_a_gradient_that_overflows_names_the_layer():
    model, end, batches = linear_pair()
    with torch.no_grad():
        model[0].weight.zero_()
    end["0.weight"] = torch.zeros(4, 5)
    # The slope of the root is infinite at 0 while the loss itself is finite: infinity times a step of 0 is NaN.
    with pytest.raises(ValueError, match="Layer '0': its score is nan.*gradient"):
        faig(model, end, batches, lambda model, batch: model[0].weight.square().sum().sqrt() + mse(model, batch))


def test_a_diverging_probe_names_its_learning_rate():
    model, _, batches = linear_pair()
    with pytest.raises(ValueError, match=r"^The loss is (nan|inf) for probe step 1 \(learning rate 1e\+30\)"):
        probe(model, batches, mse, ProbeSettings(num_steps=3, learning_rate=1e30))


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_steps": 0},
        {"num_path_steps": 0},
        *({"learning_rate": rate} for rate in (0.0, -1e-3, float("nan"), float("inf"))),
    ],
)
def test_probe_settings_that_cannot_be_are_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"^The setting {name} is {value}: "):
        ProbeSettings(**wrong)


def test_a_model_without_layers_and_a_path_without_steps():
    with pytest.raises(
        ValueError,
        match="LayerNorm has no layer that can be adapted: CoLoRA adapts Linear, Conv1d, Conv2d, Conv3d",
    ):
        faig(nn.LayerNorm(3), {}, [1], mse)
    model, end, batches = linear_pair()
    with pytest.raises(ValueError, match="num_path_steps is 0"):
        faig(model, end, batches, mse, num_path_steps=0)


def test_a_parametrized_weight_is_named():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)))
    end = {name: value + 0.1 for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="no layer that can be adapted"):
        faig(model, end, linear_pair()[2], mse)
