"""Contributions measured by several processes are those of one."""

import os
import socket
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from colora_peft import ESTIMATORS, ContributionScores, FaigSettings, ProbeSettings, estimate_contributions
from colora_peft.contribution.objective import GradientSums, MeanLoss
from colora_peft.utils.distributed import Processes

NUM_BATCHES = (1, 5)
"""Fewer batches than processes, and a number that they cannot share evenly."""
SETTINGS = {"faig": FaigSettings(3), "probe": ProbeSettings(num_steps=4, num_path_steps=3)}


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.intro = nn.Conv2d(3, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.unused = nn.Linear(2, 2)
        self.up = nn.ConvTranspose2d(4, 3, 3, padding=1)

    def forward(self, x):
        return x + self.up(torch.tanh(self.depthwise(self.intro(x))))


def noisy_loss(model, batch):
    """Draws of its own in each batch, which must not depend on who runs it."""
    output = model(batch + 0.1 * torch.randn(batch.shape))
    return (output - batch.flip(1)).square().mean()


def scores_of(num_batches, accelerator=None):
    torch.manual_seed(0)
    model = Network()
    batches = [torch.rand(2, 3, 8, 8) for _ in range(num_batches)]
    end_state = {name: value + 0.1 * torch.randn(value.shape) for name, value in model.state_dict().items()}
    results = {}
    for estimator in ESTIMATORS:
        torch.manual_seed(1)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results[estimator] = estimate_contributions(
                model,
                batches,
                noisy_loss,
                estimator,
                end_state=end_state if estimator == "faig" else None,
                settings=SETTINGS.get(estimator),
                accelerator=accelerator,
            )
        said = [str(warning.message) for warning in caught if "does not reach" in str(warning.message)]
        assert len(said) == (accelerator is None or accelerator.is_main_process)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return results


def scores_with_a_bad_batch(estimator, rank, accelerator):
    """Scores of a process; the batch of the second process that it runs itself is NaN."""
    batches = [torch.rand(1, 3, 8, 8) for _ in range(2)]
    if rank == 1:
        batches[1].fill_(torch.nan)
    model = Network()
    return estimate_contributions(
        model,
        batches,
        noisy_loss,
        estimator,
        end_state={name: value + 1 for name, value in model.state_dict().items()} if estimator == "faig" else None,
        settings=SETTINGS.get(estimator),
        accelerator=accelerator,
    )


def score_in_a_process(rank, folder, port):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1"
    )
    os.environ.update(MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    for num_batches in NUM_BATCHES:
        for estimator, result in scores_of(num_batches, accelerator).items():
            result.save(f"{folder}/{num_batches}-{estimator}-{rank}.json")
    with pytest.raises(ValueError, match="are 1 and 2 on the processes"):
        batches = [torch.rand(1, 3, 8, 8)] * (1 + rank)
        estimate_contributions(Network(), batches, noisy_loss, "gradient", accelerator=accelerator)
    for estimator in ESTIMATORS:
        with pytest.raises(ValueError, match=r"^Process 1 of 2 failed" if rank == 0 else r"^The loss is nan for"):
            scores_with_a_bad_batch(estimator, rank, accelerator)
    loader = accelerator.prepare(torch.utils.data.DataLoader([torch.rand(3, 8, 8)] * 4))
    with pytest.raises(ValueError, match="went through accelerator.prepare"):
        estimate_contributions(Network(), loader, noisy_loss, accelerator=accelerator)
    torch.distributed.barrier()
    # As in test_contract_precision.py: ending the gloo group may deadlock.
    os._exit(0)


@pytest.mark.slow
def test_two_processes_find_the_scores_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(score_in_a_process, (str(tmp_path), port), nprocs=2)
    for num_batches in NUM_BATCHES:
        for estimator, expected in scores_of(num_batches).items():
            first, second = (
                ContributionScores.load(tmp_path / f"{num_batches}-{estimator}-{rank}.json") for rank in range(2)
            )
            assert first == second
            assert first.num_processes == 2 and first.num_batches == num_batches
            assert first.scores == pytest.approx(expected.scores, rel=1e-6)
            assert first.unreached == expected.unreached == ("unused",)
            assert first.loss_start == pytest.approx(expected.loss_start, rel=1e-6)
            assert (first.path_integral is None) == (estimator not in SETTINGS)
            if estimator in SETTINGS:
                assert first.path_integral == pytest.approx(expected.path_integral, rel=1e-6)
                assert first.loss_end == pytest.approx(expected.loss_end, rel=1e-6)


class OneOf:
    """An accelerator of one of three processes, as far as sums need it; the test adds up what each found."""

    num_processes = 3

    def __init__(self, process_index):
        self.process_index = process_index


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("num_batches", [1, 2, 7])
def test_shares_of_the_processes_add_up_to_the_whole(num_batches, squared):
    torch.manual_seed(0)
    model = Network()
    batches = [torch.rand(2, 3, 8, 8) for _ in range(num_batches)]

    def share(accelerator):
        sums = GradientSums.zeros(dict(model.named_parameters()), squared)
        objective = MeanLoss(model, batches, noisy_loss, 5, Processes(accelerator))
        return sums, *objective.add_gradients(sums, "here")

    state = torch.get_rng_state()
    whole, loss, seen = share(None)
    shares = [share(OneOf(index)) for index in range(3)]
    torch.set_rng_state(state)
    assert {seen for _, _, seen in shares} == {seen} == {num_batches}
    assert sum(loss for _, loss, _ in shares) == pytest.approx(loss, rel=1e-6)
    for name, total in whole.totals.items():
        parts = sum(sums.totals[name] for sums, _, _ in shares)
        torch.testing.assert_close(parts, total, rtol=1e-5, atol=1e-6 * total.abs().max().item())
    assert set().union(*(sums.reached for sums, _, _ in shares)) == whole.reached
    assert {"unused.weight", "unused.bias"} == {*whole.totals} - whole.reached


class OneOfTwo:
    """An accelerator of the first of two processes, which is told the flag of the second."""

    num_processes, process_index, device = 2, 0, "cpu"

    def __init__(self, second_fails):
        self.second_fails = second_fails
        self.sent = []

    def gather(self, flag):
        self.sent.append(flag.item())
        return torch.tensor([flag.item(), self.second_fails])


def test_an_error_of_one_process_ends_all():
    for first_fails in (False, True):
        for second_fails in (False, True):
            accelerator = OneOfTwo(int(second_fails))
            message = "own" if first_fails else r"^Process 1 of 2 failed.*correct" if second_fails else None
            with pytest.raises(ValueError, match=message) if message else nullcontext():
                with Processes(accelerator).failing_together():
                    if first_fails:
                        raise ValueError("own")
            assert accelerator.sent == [int(first_fails)]


@pytest.mark.parametrize("estimator", ["gradient", "value"])
def test_a_process_that_fails_says_so_before_the_sums(estimator):
    accelerator = OneOfTwo(0)
    model = Network()
    objective = MeanLoss(model, [torch.full((1, 3, 8, 8), torch.nan)], noisy_loss, 5, Processes(accelerator))
    with pytest.raises(ValueError, match="The loss is nan for batch 0 here"):
        if estimator == "value":
            objective.value("here")
        else:
            objective.mean_gradients(GradientSums.zeros(dict(model.named_parameters())), "here", None)
    assert accelerator.sent == [1]
