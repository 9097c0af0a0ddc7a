"""The training loop: exact resume, the same run however it is split, and a clean stop where the loss diverges."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import get_peft_model
from safetensors.torch import load_file
from support.examples import TESTS
from support.loop import (
    DiesAt,
    FailsAt,
    InfiniteGradient,
    Killed,
    NoisyPatches,
    arguments,
    assert_equal,
    launch_two,
    nafnet,
    plain,
    rows,
    run,
)
from torch import nn

from colora_peft import CoLoRAConfig
from colora_peft.inference import restoration_loss
from colora_peft.training import checkpoint as checkpoint_module
from colora_peft.training.checkpoint import list_checkpoints
from colora_peft.training.loop import DataFailed, TrainingDiverged, reconstruct, train
from colora_peft.tuner import METHOD_VERSION

# --- exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [nafnet, plain])
@pytest.mark.parametrize(("killed_in_step", "resumed_at"), [(3, 2), (5, 4)])  # in the first epoch, and in the second
def test_killed_and_resumed_run_ends_with_the_same_weights(tmp_path, make, killed_in_step, resumed_at):
    flags = {"checkpointing_steps": resumed_at, "lr_warmup_steps": 2}
    expected = run(tmp_path / "whole", make(), lr_warmup_steps=2)
    with pytest.raises(Killed):
        run(tmp_path / "parts", make(), DiesAt(2 * killed_in_step + 1), **flags)
    assert [path.name for path in list_checkpoints(tmp_path / "parts")][-1] == f"checkpoint-{resumed_at}"
    torch.manual_seed(123)  # whatever the global state is
    resumed = run(tmp_path / "parts", make(), resume_from_checkpoint="latest", **flags)
    assert_equal(resumed, expected)


@pytest.mark.parametrize("killed_at", [13, 14, 15])  # in the first and the second batch of step 3
def test_kill_under_accumulation_and_averaging_changes_nothing(tmp_path, killed_at):
    flags = {"gradient_accumulation_steps": 2, "use_ema": True, "ema_decay": 0.6}
    expected = run(tmp_path / "whole", plain(), **flags)
    with pytest.raises(Killed):
        run(tmp_path / "parts", plain(), DiesAt(killed_at), checkpointing_steps=2, **flags)
    resumed = run(tmp_path / "parts", plain(), resume_from_checkpoint="latest", checkpointing_steps=2, **flags)
    assert_equal(resumed, expected)
    for name in ("model", "optimizer", "ema"):
        files = [tmp_path / folder / "checkpoint-6" / f"{name}.safetensors" for folder in ("whole", "parts")]
        assert_equal(*map(load_file, files))


class Precise(nn.Module):
    """A network that computes in float64, so that only the data, not the order of sums, can make a difference."""

    config = SimpleNamespace(pads_to_multiple=2)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 3, 3, padding=1)
        self.layers = nn.Sequential(*layers).double()

    def forward(self, x):
        return self.layers(x.double())


@pytest.mark.parametrize("weight", [0, 5])
@pytest.mark.parametrize(("batch_size", "accumulated"), [(1, 6), (2, 3), (3, 2)])
def test_accumulation_equals_the_larger_batch(tmp_path, batch_size, accumulated, weight):
    loss = {"checkerboard_weight": weight}
    whole = run(tmp_path / "whole", Precise(), per_device_train_batch_size=6, **loss)
    parts = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulated}
    summed = run(tmp_path / "parts", Precise(), **parts, **loss)
    for name, tensor in summed.items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=1e-6)
    other = run(tmp_path / "other", Precise(), per_device_train_batch_size=5, **loss)
    assert max((other[name] - tensor).abs().max() for name, tensor in whole.items()) > 1e-3
    plain_loss = run(tmp_path / "plain", Precise(), per_device_train_batch_size=6)
    assert any(not torch.equal(plain_loss[name], tensor) for name, tensor in whole.items()) == bool(weight)
    (row,), (expected,) = (rows(tmp_path / folder) for folder in ("parts", "whole"))
    assert row["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    assert row["psnr"] == pytest.approx(expected["psnr"], abs=1e-4)


def test_result_is_the_average_of_the_weights_of_the_steps(tmp_path):
    decay, flags = 0.3, {"checkpointing_steps": 1, "checkpoints_total_limit": 0}
    result = run(tmp_path / "ema", nafnet(), use_ema=True, ema_decay=decay, **flags)
    run(tmp_path / "bare", nafnet(), **flags)
    expected = nafnet().state_dict()
    for step in range(1, 7):
        weights = load_file(tmp_path / "ema" / f"checkpoint-{step}" / "model.safetensors")
        # Averaging leaves the training as it is.
        assert_equal(weights, load_file(tmp_path / "bare" / f"checkpoint-{step}" / "model.safetensors"))
        past = min(decay, (1 + step) / (10 + step))
        expected = {name: past * tensor + (1 - past) * weights[name] for name, tensor in expected.items()}
    for name, tensor in result.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
    assert not torch.equal(result["intro.weight"], weights["intro.weight"])


def test_a_prolonged_run_ends_as_one_that_was_as_long_from_the_beginning(tmp_path):
    stable = {"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 1, "use_ema": True}
    expected = run(tmp_path / "whole", nafnet(), max_train_steps=8, lr_decay_steps=3, **stable)
    run(tmp_path / "parts", nafnet(), max_train_steps=4, **stable)
    flags = {"max_train_steps": 8, "lr_decay_steps": 3, "resume_from_checkpoint": "latest", **stable}
    assert_equal(run(tmp_path / "parts", nafnet(), **flags), expected)
    assert rows(tmp_path / "parts")[-1]["learning_rate"] < 0.01


def test_adapters_are_averaged_and_resumed_and_the_base_is_not_stored(tmp_path):
    def adapted():
        torch.manual_seed(1)
        return get_peft_model(nafnet(), CoLoRAConfig(parameter_budget=0.3))

    base = nafnet().state_dict()
    flags = {"use_ema": True, "checkpointing_steps": 2, "gradient_accumulation_steps": 2}
    expected = run(tmp_path / "whole", adapted(), **flags)
    with pytest.raises(Killed):
        run(tmp_path / "parts", adapted(), DiesAt(18), **flags)
    resumed = run(tmp_path / "parts", adapted(), resume_from_checkpoint="latest", **flags)
    assert_equal(resumed, expected)
    checkpoint = tmp_path / "whole" / "checkpoint-6"
    weights, averages = (load_file(checkpoint / f"{name}.safetensors") for name in ("model", "ema"))
    assert weights.keys() == averages.keys() and all("colora_" in name for name in averages)
    assert_equal(averages, {name: expected[name] for name in averages})
    assert any(not torch.equal(averages[name], weights[name]) for name in averages)
    frozen = {name.replace("base_model.model.", "").replace(".base_layer", ""): name for name in expected}
    assert_equal(base, {name: expected[frozen[name]] for name in base})


def test_training_moves_the_weights_and_lowers_the_loss(tmp_path):
    model, batch = nafnet(), NoisyPatches()[0]
    batch = {key: value[None] for key, value in batch.items()}
    before, start = restoration_loss(model, batch).item(), model.state_dict()["intro.weight"].clone()
    trained = run(tmp_path, model, max_train_steps=15)
    assert not torch.equal(trained["intro.weight"], start)
    assert restoration_loss(model, batch).item() < 0.7 * before


def test_same_seed_same_weights_another_seed_others(tmp_path):
    first, same, other = (run(tmp_path / str(i), plain(), NoisyPatches(seed)) for i, seed in enumerate((0, 0, 1)))
    assert_equal(first, same)
    assert not torch.equal(first["0.weight"], other["0.weight"])


def test_number_of_workers_changes_nothing(tmp_path):
    alone = run(tmp_path / "alone", plain(), max_train_steps=4)
    assert_equal(run(tmp_path / "workers", plain(), max_train_steps=4, dataloader_num_workers=2), alone)


@pytest.mark.slow
def test_two_processes_give_the_same_network_as_one(tmp_path):
    expected = run(tmp_path / "one", nafnet(), max_train_steps=4)
    launch_two(tmp_path, tmp_path / "two")
    trained = load_file(tmp_path / "two" / "checkpoint-4" / "model.safetensors")
    assert trained.keys() == expected.keys()
    for name, tensor in trained.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)
    (one,), (two,) = (rows(tmp_path / name) for name in ("one", "two"))
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert two["psnr"] == pytest.approx(one["psnr"], abs=1e-3)


@pytest.mark.slow
def test_a_run_begun_on_two_processes_goes_on_with_one(tmp_path):
    """The global batch of 4 over 2 processes, then 2 batches of 2 that one process adds up."""
    flags = {"max_train_steps": 4, "use_ema": True, "checkpointing_steps": 2}
    expected = run(tmp_path / "one", nafnet(), per_device_train_batch_size=4, **flags)
    launch_two(tmp_path, tmp_path / "two", per_device_train_batch_size=1, gradient_accumulation_steps=2, **flags)
    shutil.rmtree(tmp_path / "two" / "checkpoint-4")
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    resumed = run(tmp_path / "two", nafnet(), resume_from_checkpoint="latest", **parts, **flags)
    for name, tensor in resumed.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_all_processes_stop_where_one_diverges(tmp_path):
    launch_two(tmp_path, tmp_path / "run", broken=[5])  # number 5 is of step 2 on the second process
    for rank in (0, 1):
        assert (tmp_path / f"stopped{rank}").read_text().startswith("TrainingDiverged The loss became nan at step 2 ")
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-2"]


# --- divergence -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [nafnet, plain])
@pytest.mark.parametrize("step", [0, 3])
def test_nan_stops_the_run_and_keeps_the_state_before_it(tmp_path, make, step):
    with pytest.raises(TrainingDiverged, match=f"nan at step {step} "):
        run(tmp_path / "nan", make(), NoisyPatches(broken=[2 * step + 1]))
    saved = load_file(tmp_path / "nan" / f"checkpoint-{step}" / "model.safetensors")
    if step == 0:
        assert_equal(saved, make().state_dict())
        return
    with pytest.raises(Killed):
        run(tmp_path / "killed", make(), DiesAt(2 * step), checkpointing_steps=step)
    assert_equal(saved, load_file(tmp_path / "killed" / f"checkpoint-{step}" / "model.safetensors"))
    assert all(tensor.isfinite().all() for tensor in saved.values())


def test_infinite_gradient_stops_the_run(tmp_path):
    with pytest.raises(TrainingDiverged, match="gradient norm inf"):
        run(tmp_path, InfiniteGradient())
    assert load_file(tmp_path / "checkpoint-0" / "model.safetensors")["weight"].item() == 0


# --- log and checkpoints --------------------------------------------------------------------------------------------


def test_log_has_increasing_steps_after_a_resume(tmp_path):
    flags = {"max_train_steps": 45, "checkpointing_steps": 15}
    with pytest.raises(Killed):
        run(tmp_path, plain(), DiesAt(2 * 42), **flags)
    log = tmp_path / "train_log.jsonl"
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [20, 40]
    log.write_text(log.read_text() + '{"step": 4')  # killed while it wrote
    run(tmp_path, plain(), resume_from_checkpoint="latest", **flags)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["step"] for row in rows] == [20, 40, 45]
    assert rows[-1]["learning_rate"] == pytest.approx(arguments(tmp_path, **flags).learning_rate_at(44))
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)


def test_log_holds_the_mean_loss_and_psnr_of_its_steps(tmp_path):
    class Stuck(nn.Conv2d):  # returns its input and learns nothing
        def forward(self, x):
            return x + 0 * self.weight.sum()

    dataset = NoisyPatches()
    run(tmp_path, Stuck(3, 3, 1), max_train_steps=3)
    (row,) = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
    differences = [dataset[number]["pixel_values"] - dataset[number]["labels"] for number in range(6)]
    psnr = [-10 * difference.square().mean().log10().item() for difference in differences]
    assert row["loss"] == pytest.approx(sum(d.abs().mean().item() for d in differences) / 6, rel=1e-5)
    assert row["psnr"] == pytest.approx(sum(psnr) / 6, rel=1e-5)


def test_checkpoints_appear_at_their_steps_and_at_the_end(tmp_path):
    run(tmp_path, plain(), max_train_steps=5, checkpointing_steps=2, checkpoints_total_limit=0)
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in (2, 4, 5)]


@pytest.mark.parametrize("failing", ["model", "optimizer", "ema", "trainer_state"])
def test_full_disk_ends_the_run_and_the_checkpoint_before_goes_on(tmp_path, monkeypatch, failing):
    flags = {"use_ema": True, "checkpointing_steps": 2}
    expected = run(tmp_path / "whole", nafnet(), **flags)
    fails_in_its_second_save(monkeypatch, failing)
    with pytest.raises(OSError, match="checkpoint-4 could not be written .*No space left.*--resume_from_checkpoint"):
        run(tmp_path / "parts", nafnet(), **flags)
    monkeypatch.undo()
    left = {path.name for path in (tmp_path / "parts").iterdir()}
    assert left == {"checkpoint-2", "run.json", ".run.lock"}
    assert_equal(run(tmp_path / "parts", nafnet(), resume_from_checkpoint="latest", **flags), expected)


def fails_in_its_second_save(monkeypatch, name):
    """Makes the disk full when the file of this name is written for the second time, and half of it is there."""
    written = []

    def full_when_due(write):
        def wrapped(first, second):
            path = first if isinstance(first, Path) else second  # write_json(path, ...), save_file(..., path)
            if path.stem == name:
                written.append(path)
            if len(written) == 2 and written[-1] == path:
                path.write_bytes(b"half")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(first, second)

        return wrapped

    for function in ("save_file", "write_json"):
        monkeypatch.setattr(checkpoint_module, function, full_when_due(getattr(checkpoint_module, function)))


def test_finished_run_can_be_resumed_and_stays_as_it_is(tmp_path):
    expected = run(tmp_path, nafnet())
    assert_equal(run(tmp_path, nafnet(), resume_from_checkpoint="latest"), expected)


def test_resume_with_another_global_batch_is_refused_and_changes_nothing(tmp_path):
    run(tmp_path, nafnet(), max_train_steps=2)
    model = nafnet()
    flags = {"resume_from_checkpoint": "latest", "per_device_train_batch_size": 3, "max_train_steps": 2}
    with pytest.raises(ValueError, match="2 patches a step.* 3; set --per_device_train_batch_size and --gradient_acc"):
        run(tmp_path, model, **flags)
    assert_equal(model.state_dict(), nafnet().state_dict())


def test_frozen_parameters_stay_and_are_not_stored(tmp_path):
    model = plain()
    model[0].requires_grad_(False)
    trained = run(tmp_path, model)
    assert torch.equal(trained["0.weight"], plain()[0].weight)
    assert not torch.equal(trained["3.weight"], plain()[3].weight)
    assert not any(name.startswith("0.") for name in load_file(tmp_path / "checkpoint-6" / "model.safetensors"))


def test_a_run_does_not_go_on_over_another_base(tmp_path):
    def adapted(brightness):
        model = nafnet()
        with torch.no_grad():
            model.ending.weight += brightness
        return get_peft_model(model, CoLoRAConfig(ranks=2))

    run(tmp_path, adapted(0.0), max_train_steps=2)
    resume = {"resume_from_checkpoint": "latest", "max_train_steps": 2}
    with pytest.raises(ValueError, match="other frozen weights .*the network to adapt was replaced"):
        run(tmp_path, adapted(0.1), **resume)
    run(tmp_path, adapted(0.0), **resume)


def test_a_run_does_not_go_on_with_an_adapter_of_another_scaling(tmp_path):
    def adapted():
        return get_peft_model(nafnet(), CoLoRAConfig(ranks=2))

    run(tmp_path, adapted(), max_train_steps=2)
    resume = {"resume_from_checkpoint": "latest", "max_train_steps": 2}
    run(tmp_path, adapted(), **resume)
    state_file = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(state_file.read_text())
    assert state["method_version"] == METHOD_VERSION
    state_file.write_text(json.dumps({**state, "method_version": METHOD_VERSION - 1}))
    model = adapted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=f"of method_version {METHOD_VERSION - 1}, this .* {METHOD_VERSION}, .* finish the run"
    ):
        run(tmp_path, model, **resume)
    assert_equal(model.state_dict(), before)


@pytest.mark.parametrize("version", [None, 1, 2])
def test_checkpoints_of_older_releases_name_no_method_version(tmp_path, version):
    def make():
        config = CoLoRAConfig(ranks=2, method_version=version)
        return nafnet() if version is None else get_peft_model(nafnet(), config)

    run(tmp_path, make(), max_train_steps=2)
    state_file = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(state_file.read_text())
    del state["method_version"]
    state_file.write_text(json.dumps(state))
    run(tmp_path, make(), resume_from_checkpoint="latest", max_train_steps=2)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [ConnectionError("The server is away."), RuntimeError("Traceback\nkilled")])
def test_images_that_cannot_be_had_cost_no_step(tmp_path, error, workers):
    flags = {"gradient_accumulation_steps": 2, "use_ema": True, "dataloader_num_workers": workers}
    expected = run(tmp_path / "whole", plain(), **flags)
    reason = "The next images could not be had: .*(away|killed)[.] What 3 steps have made is saved as .*-3: go on"
    with pytest.raises(DataFailed, match=reason) as raised:
        run(tmp_path / "parts", plain(), FailsAt(14, error), **flags)
    assert "\n" not in str(raised.value)
    assert_equal(run(tmp_path / "parts", plain(), resume_from_checkpoint="latest", **flags), expected)


ENDS = """
import gc, sys
sys.path.insert(0, {tests!r})
from support.loop import FailsAt, NoisyPatches, nafnet, run
gc.disable()  # whether it comes by in time is chance
errors = {{"fails": OSError("away"), "breaks": KeyError("bug")}}
kinds = {{"diverges": NoisyPatches(broken=[5]), **{{how: FailsAt(5, error) for how, error in errors.items()}}}}
run(sys.argv[1], nafnet(), kinds[sys.argv[2]], checkpointing_steps=2, dataloader_num_workers=1)
"""


@pytest.mark.parametrize(
    ("how", "error"), [("diverges", "TrainingDiverged"), ("fails", "DataFailed"), ("breaks", "KeyError")]
)
def test_a_run_that_ends_early_does_not_wait_for_its_workers(tmp_path, how, error):
    script = tmp_path / "script.py"
    script.write_text(ENDS.format(tests=str(TESTS)))
    command = [sys.executable, str(script), str(tmp_path / "out"), how]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)  # they ignore the signals to stop
    assert result.returncode == 1 and error in result.stderr
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["checkpoint-2"]


def test_images_that_cannot_be_had_at_the_start_leave_no_checkpoint(tmp_path):
    with pytest.raises(DataFailed, match="could not be had: gone[.]$"):
        run(tmp_path, plain(), FailsAt(0, ValueError("gone")))
    assert list_checkpoints(tmp_path) == []


# --- networks -------------------------------------------------------------------------------------------------------


class Video(nn.Module):
    """Three-dimensional convolutions cannot have the channels last of two-dimensional ones."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(3, 3, 1)

    def forward(self, x):
        return SimpleNamespace(reconstruction=self.conv(x[:, :, None])[:, :, 0])


@pytest.mark.parametrize("settings", [{"dynamo_backend": "eager"}, {"mixed_precision": "bf16"}])
def test_the_result_is_the_network_and_not_what_accelerate_puts_around_it(tmp_path, settings):
    args, model = arguments(tmp_path), nafnet()
    names = list(model.state_dict())
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        trained, _ = train(model, NoisyPatches(), args, Accelerator(cpu=True, **settings))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert trained is model and list(trained.state_dict()) == names
    assert trained(torch.rand(1, 3, 8, 8)).reconstruction.dtype == torch.float32


def test_networks_with_three_dimensional_convolutions_train(tmp_path):
    start = Video().requires_grad_(True)
    before = start.conv.weight.detach().clone()
    assert not torch.equal(run(tmp_path, start)["conv.weight"], before)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: SimpleNamespace(reconstruction=x)])
def test_tensor_and_reconstruction_are_understood(wrap):
    class Half(nn.Module):
        def forward(self, x):
            return wrap(x / 2)

    x, labels = torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4)
    assert torch.equal(reconstruct(Half(), x), x / 2)
    loss = restoration_loss(Half(), {"pixel_values": x, "labels": labels})
    torch.testing.assert_close(loss, (x / 2 - labels).abs().mean())


@pytest.mark.parametrize("output", [(torch.rand(1, 3, 4, 4),), None, {"reconstruction": 1}])
def test_other_outputs_are_refused(output):
    class Other(nn.Module):
        def forward(self, x):
            return output

    with pytest.raises(TypeError, match="Other returned"):
        reconstruct(Other(), torch.rand(1, 3, 4, 4))


def test_restored_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 1, 4, 4\)"):
        reconstruct(nn.Conv2d(3, 1, 1), torch.rand(1, 3, 4, 4))
