"""The mean loss is one fixed function of the weights, whatever loss function and loader do."""

from dataclasses import replace

import pytest
import torch
from support.estimate import mse, restorer_task
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from colora_peft import FaigSettings, ProbeSettings, estimate_contributions
from colora_peft.contribution.objective import GradientSums, MeanLoss
from colora_peft.contribution.weight_space import moving_parameters, put_back_afterwards
from colora_peft.utils.distributed import Processes

pytestmark = pytest.mark.filterwarnings("ignore:The loss does not reach")


def batch_statistics_loss(model, batch):
    """Its running statistics count, too: the second look is with those that the first one left."""
    model.train()
    first = mse(model, batch)
    model.eval()
    second = mse(model, batch)
    model.train()
    return first + second


def test_running_statistics_make_no_difference_to_a_later_pass():
    model, batches = restorer_task(num_batches=3, with_batch_norm=True)
    with put_back_afterwards(model):
        objective = MeanLoss(model, batches, batch_statistics_loss, 5, Processes(None))
        backwards = replace(objective, batches=batches[::-1])
        before = objective.value("before")
        objective.add_gradients(GradientSums.zeros(moving_parameters(model)), "between")
        for batch in batches:
            batch_statistics_loss(model, batch)
        assert objective.value("after") == before
        # Nor to a later batch.
        assert backwards.value("backwards")[0] == pytest.approx(before[0], rel=1e-6)


def test_completeness_with_a_loss_that_sets_the_training_mode():
    model, batches = restorer_task(num_batches=3, with_batch_norm=True)
    settings = ProbeSettings(num_steps=10, learning_rate=1e-3, num_path_steps=16)
    result = estimate_contributions(model, batches, batch_statistics_loss, "probe", settings=settings)
    assert result.completeness_error < 0.02
    one_pass = estimate_contributions(model, batches, batch_statistics_loss, "gradient")
    assert one_pass.loss_start == result.loss_start


def shuffling(batches, where):
    """A loader that draws its order from a generator of its own, and that generator."""
    generator = torch.Generator().manual_seed(3)
    if where == "loader":
        return DataLoader(batches, batch_size=None, shuffle=True, generator=generator), generator
    sampler = RandomSampler(batches, generator=generator)
    if where == "sampler":
        return DataLoader(batches, batch_size=2, sampler=sampler, collate_fn=first_of), generator
    return DataLoader(batches, batch_sampler=BatchSampler(sampler, 2, True), collate_fn=first_of), generator


def first_of(samples):
    return samples[0]


@pytest.mark.parametrize("where", ["loader", "sampler", "sampler of the batch sampler"])
@pytest.mark.parametrize("estimator", ["faig", "probe", "gradient"])
def test_a_loader_with_a_generator_of_its_own_gives_each_pass_the_same(where, estimator):
    model, batches = restorer_task(num_batches=6)
    loader, generator = shuffling(batches, where)
    end = {name: value + 0.02 for name, value in model.state_dict().items()}
    settings = {"faig": FaigSettings(16), "probe": ProbeSettings(8, 1e-3, 4)}

    def noisy_loss(model, batch):
        return mse(model, (batch[0] + 0.05 * torch.randn(batch[0].shape), batch[1]))

    def scores():
        torch.manual_seed(1)
        end_state = end if estimator == "faig" else None
        return estimate_contributions(
            model, loader, noisy_loss, estimator, end_state=end_state, settings=settings.get(estimator)
        )

    state = generator.get_state()
    first = scores()
    assert torch.equal(generator.get_state(), state)
    assert replace(scores(), seconds=first.seconds) == first
    assert first.completeness_error is None or first.completeness_error < 0.02
    next(iter(loader))
    assert not torch.equal(generator.get_state(), state)


def test_the_generator_of_a_loader_is_restored_when_the_loss_raises():
    model, batches = restorer_task(num_batches=3)
    loader, generator = shuffling(batches, "loader")
    state = generator.get_state()
    with pytest.raises(ValueError, match="a float for batch 0"):
        estimate_contributions(model, loader, lambda model, batch: 1.0, "gradient")
    assert torch.equal(generator.get_state(), state)
