"""Checkpoints: what goes in comes out, bit for bit, and there is never half of one."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from colora_peft.training import checkpoint as checkpoint_module
from colora_peft.training.checkpoint import (
    checkpoint_tensors,
    frozen_digest,
    list_checkpoints,
    read_state,
)


def save_checkpoint(folder, model, optimizer, state, limit, averages=None):
    return checkpoint_module.save_checkpoint(folder, checkpoint_tensors(model, optimizer.state, averages), state, limit)


def load_checkpoint(path, model, optimizer, averages=None):
    state, optimizer.state = checkpoint_module.load_checkpoint(path, model, averages)
    return state


class Network(nn.Module):
    """A convolution, a batch norm and a frozen convolution; `swapped` registers them in another order."""

    def __init__(self, seed, channels=4, swapped=False):
        super().__init__()
        torch.manual_seed(seed)
        modules = {"conv": nn.Conv2d(3, channels, 3), "norm": nn.BatchNorm2d(channels), "frozen": nn.Conv2d(3, 3, 1)}
        for name in sorted(modules, reverse=swapped):
            self.add_module(name, modules[name])
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.norm(self.conv(self.frozen(x)))


def trained_network(seed=0, steps=2, **settings):
    model = Network(seed, **settings).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    for _ in range(steps):
        model(torch.rand(2, 3, 5, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def everything(model, optimizer):
    """All weights, buffers and moments by name, copied."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"{name}/{key}": value.clone() for key, value in optimizer.state.get(parameter, {}).items()}
    return tensors


def assert_equal(one, other, but=()):
    assert one.keys() == other.keys()
    different = {name for name in one if not torch.equal(one[name], other[name])}
    assert different == set(but)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_weights_buffers_and_moments_come_back_bit_for_bit(tmp_path, swapped, layout):
    model, optimizer = trained_network()
    path = save_checkpoint(tmp_path, model, optimizer, {"step": 2, "note": "a"}, limit=None)
    other, other_optimizer = trained_network(seed=1, steps=3, swapped=swapped)
    other.to(memory_format=layout)
    assert load_checkpoint(path, other, other_optimizer) == {"step": 2, "note": "a"}
    assert_equal(
        everything(model, optimizer), everything(other, other_optimizer), but=["frozen.weight", "frozen.bias"]
    )
    assert other_optimizer.state[other.conv.weight]["exp_avg"].stride() == other.conv.weight.stride()


def test_training_goes_on_equally(tmp_path):
    x = torch.rand(2, 3, 5, 5)
    model, optimizer = trained_network()
    path = save_checkpoint(tmp_path, model, optimizer, {"step": 2}, limit=None)
    other, other_optimizer = trained_network(seed=0, steps=0)
    load_checkpoint(path, other, other_optimizer)
    for net, opt in ((model, optimizer), (other, other_optimizer)):
        net(x).square().mean().backward()
        opt.step()
    assert_equal(everything(model, optimizer), everything(other, other_optimizer))


def test_only_what_training_changes_is_stored(tmp_path):
    path = save_checkpoint(tmp_path, *trained_network(), {"step": 2}, limit=None)
    trained = {"conv.weight", "conv.bias", "norm.weight", "norm.bias"}
    buffers = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert load_file(path / "model.safetensors").keys() == trained | buffers
    moments = {f"{name}/{key}" for name in trained for key in ("step", "exp_avg", "exp_avg_sq")}
    assert load_file(path / "optimizer.safetensors").keys() == moments


# --- rotation and interruption --------------------------------------------------------------------------------------


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("limit", "kept"), [(1, [10]), (2, [9, 10]), (None, [8, 9, 10])])
def test_rotation_keeps_the_newest(tmp_path, limit, kept):
    run = trained_network()
    (tmp_path / "checkpoint-best").mkdir()
    for step in (8, 9, 10):
        save_checkpoint(tmp_path, *run, {"step": step}, limit)
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in kept]
    assert (tmp_path / "checkpoint-best").is_dir()


@pytest.mark.parametrize(("limit", "kept"), [(1, [15]), (2, [10, 15]), (None, [10, 15])])
def test_a_run_that_goes_back_leaves_nothing_of_the_steps_that_it_left(tmp_path, limit, kept):
    run = trained_network()
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, *run, {"step": step}, limit=None)
    save_checkpoint(tmp_path, *run, {"step": 15}, limit)  # went on from 10: `latest` is 15 now
    assert names(tmp_path) == [f"checkpoint-{step}" for step in kept]


def test_digest_of_the_frozen_weights_follows_these_alone():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    assert frozen_digest(model) is None
    model[0].requires_grad_(False)
    first = frozen_digest(model)
    with torch.no_grad():
        model[1].weight += 1
        assert frozen_digest(model) == first
        model[0].weight += 1
    assert frozen_digest(model) != first


def test_leftover_of_a_killed_save_neither_counts_nor_stays(tmp_path):
    run = trained_network()
    save_checkpoint(tmp_path, *run, {"step": 4}, limit=2)
    partial = tmp_path / ".checkpoint-5.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4"]
    save_checkpoint(tmp_path, *run, {"step": 6}, limit=2)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize("failing_call", [1, 2])
@pytest.mark.parametrize("step", [4, 5])
def test_failed_save_leaves_the_earlier_checkpoint_alone(tmp_path, monkeypatch, failing_call, step):
    model, optimizer = trained_network()
    expected = everything(model, optimizer)
    path = save_checkpoint(tmp_path, model, optimizer, {"step": 4}, limit=1)
    calls = []

    def full_disk(tensors, filename):
        calls.append(filename)
        if len(calls) == failing_call:
            filename.write_bytes(b"half")
            raise OSError("No space left on device")
        save_file(tensors, filename)

    monkeypatch.setattr(checkpoint_module, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, *trained_network(seed=3), {"step": step}, limit=1)
    assert names(tmp_path) == ["checkpoint-4"]
    load_checkpoint(path, model, optimizer)
    assert_equal(everything(model, optimizer), expected)


@pytest.mark.parametrize("limit_bytes", [100, 700, 2500])  # in the weights, the moments, the state
def test_file_that_the_system_refuses_to_write_on_leaves_the_earlier_checkpoint_alone(tmp_path, limit_bytes):
    resource = pytest.importorskip("resource")
    model, optimizer = trained_network()
    path = save_checkpoint(tmp_path, model, optimizer, {"step": 4}, limit=1)
    state = {"step": 5, "note": "a" * 3000}
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, old[1]))
    try:
        with pytest.raises(OSError, match="checkpoint-5 could not be written .*--resume_from_checkpoint latest"):
            save_checkpoint(tmp_path, *trained_network(seed=3), state, limit=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert names(tmp_path) == ["checkpoint-4"]
    assert load_checkpoint(path, *trained_network(seed=1)) == {"step": 4}
    assert save_checkpoint(tmp_path, model, optimizer, state, limit=1).name == "checkpoint-5"


@pytest.mark.parametrize("averages", [{}, {"conv.weight": torch.zeros(2)}, {"norm.bias": torch.zeros(4)}])
def test_averages_of_other_parameters_are_refused(tmp_path, averages):
    model, optimizer = trained_network()
    own = {"conv.weight": model.conv.weight.detach().clone()}
    path = save_checkpoint(tmp_path, model, optimizer, {"step": 2}, limit=None, averages=averages)
    with pytest.raises(ValueError, match=r"average of (conv\.weight|norm\.bias)"):
        load_checkpoint(path, model, optimizer, own)
    assert torch.equal(own["conv.weight"], model.conv.weight)


def test_checkpoint_without_averages_is_refused_where_they_are_needed(tmp_path):
    model, optimizer = trained_network()
    path = save_checkpoint(tmp_path, model, optimizer, {"step": 2}, limit=None)
    with pytest.raises(ValueError, match=r"no readable checkpoint.*ema\.safetensors"):
        load_checkpoint(path, model, optimizer, {"conv.weight": model.conv.weight.detach().clone()})


def test_saving_a_step_again_replaces_it(tmp_path):
    save_checkpoint(tmp_path, *trained_network(seed=3), {"step": 4}, limit=2)
    model, optimizer = trained_network(seed=4)
    path = save_checkpoint(tmp_path, model, optimizer, {"step": 4}, limit=2)
    assert names(tmp_path) == ["checkpoint-4"]
    assert torch.equal(load_file(path / "model.safetensors")["conv.bias"], model.conv.bias)


# --- refusals -------------------------------------------------------------------------------------------------------


def assert_refused(path, model, optimizer, match):
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=match):
        load_checkpoint(path, model, optimizer)
    assert_equal(everything(model, optimizer), before)


def test_checkpoint_of_another_model_is_refused_by_name(tmp_path):
    path = save_checkpoint(tmp_path, *trained_network(channels=5), {"step": 2}, limit=None)
    assert_refused(path, *trained_network(seed=1), match=r"another model.*conv\.bias")


def test_checkpoint_of_another_method_is_refused_by_name(tmp_path):
    path = save_checkpoint(tmp_path, *trained_network(), {"step": 2}, limit=None)
    model, optimizer = trained_network(seed=1)
    model.conv.weight.requires_grad_(False)
    assert_refused(path, model, optimizer, match=r"another model or method.*conv\.weight")


@pytest.mark.parametrize("key", ["conv.weight/exp_avg", "conv.bias/step", "frozen.bias/exp_avg", "nonsense"])
def test_moments_of_another_run_are_refused_before_anything_changes(tmp_path, key):
    path = save_checkpoint(tmp_path, *trained_network(), {"step": 2}, limit=None)
    moments = load_file(path / "optimizer.safetensors")
    save_file({**moments, key: torch.zeros(7)}, path / "optimizer.safetensors")
    assert_refused(path, *trained_network(seed=1), match=key)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer_state.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "binary"])
def test_damaged_files_are_refused(tmp_path, name, damage):
    path = save_checkpoint(tmp_path, *trained_network(), {"step": 2}, limit=None)
    content = (path / name).read_bytes()
    (path / name).unlink()
    if damage != "missing":
        (path / name).write_bytes(content[: len(content) // 2] if damage == "truncated" else b"\xff\xfe\x00")
    assert_refused(path, *trained_network(seed=1), match="checkpoint-2 is no readable checkpoint")


@pytest.mark.parametrize("content", ["[]", "{}", '{"step": "five"}'])
def test_state_without_a_step_is_refused(tmp_path, content):
    (tmp_path / "trainer_state.json").write_text(content)
    with pytest.raises(ValueError, match="no step"):
        read_state(tmp_path)
