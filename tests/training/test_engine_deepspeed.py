"""A run under DeepSpeed over two processes is that of one process without it, and each goes on with the other's
checkpoints. Two processes are launched by torchrun, since Accelerate launches but one under DeepSpeed on a CPU."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, DistributedType, DynamoBackend
from safetensors.torch import load_file
from support.engine_deepspeed import NETWORKS
from support.examples import EXAMPLES, TESTS
from support.fsdp import assert_close
from support.loop import assert_equal, nafnet, run
from torch import nn

from colora_peft.inference.network import needed_multiple
from colora_peft.training import engine_deepspeed as zero
from colora_peft.training.checkpoint import list_checkpoints
from colora_peft.training.engine_deepspeed import ZeroEngine, check_zero

SCRIPT = """
import json, os, sys
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, DistributedType
sys.path.insert(0, {tests!r})
from safetensors.torch import save_file
from support.loop import NoisyPatches, arguments
from support.engine_deepspeed import NETWORKS
from colora_peft.training import check_output_dir, open_output_dir
from colora_peft.training import TrainingDiverged, train
for case in json.loads(sys.argv[1]):
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=case["precision"],
        deepspeed_plugin=DeepSpeedPlugin(zero_stage=case["stage"]),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )
    assert accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.num_processes == 2
    args = arguments(case["folder"], **case["flags"])
    checkpoint = check_output_dir(args)
    try:
        with open_output_dir(args, accelerator, checkpoint):
            model, data = NETWORKS[case["network"]](), NoisyPatches(broken=case["broken"])
            trained, _ = train(model, data, args, accelerator, checkpoint)
    except TrainingDiverged as error:
        with open(f"{{case['folder']}}-{{accelerator.process_index}}.txt", "w") as file:
            file.write(str(error))
        continue
    assert trained is model and accelerator.mixed_precision == case["precision"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.untyped_storage().nbytes() == parameter.nbytes for parameter in model.parameters())
    if accelerator.is_main_process:
        save_file(model.state_dict(), case["folder"] + ".safetensors")
torch.distributed.barrier()
os._exit(0)  # ending the gloo group may deadlock
"""


CONFIG = EXAMPLES / "accelerate_configs" / "deepspeed_zero2.yaml"
FLAGS = {
    "max_train_steps": 4, "checkpointing_steps": 2, "use_ema": True, "ema_decay": 0.6, "lr_warmup_steps": 2,
    "max_grad_norm": 0.05,
}  # fmt: skip
TWO = {**FLAGS, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
ONE = {**FLAGS, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
RESUMED = {"resume_from_checkpoint": "latest"}


def case(folder, stage=2, precision="no", network="nafnet", broken=(), **flags):
    return {
        "folder": str(folder), "stage": stage, "precision": precision, "network": network, "broken": list(broken),
        "flags": flags,
    }  # fmt: skip


def launch(tmp_path, cases):
    """Trains them one after another under DeepSpeed."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(TESTS)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {
        **os.environ, "ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run([*command, json.dumps(cases)], capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def assert_same_checkpoint(one, other, step=4):
    folders = [folder / f"checkpoint-{step}" for folder in (one, other)]
    for name in ("model", "ema"):
        assert_close(*(load_file(folder / f"{name}.safetensors") for folder in folders))
    found, expected = (load_file(folder / "optimizer.safetensors") for folder in folders)
    assert found.keys() == expected.keys() != set()
    largest = {}
    for key, value in expected.items():
        moment = key.rpartition("/")[2]
        largest[moment] = max(largest.get(moment, 0), value.abs().max().item())
    for key, value in expected.items():
        tolerance = 1e-4 * largest[key.rpartition("/")[2]]
        torch.testing.assert_close(found[key], value, rtol=0, atol=tolerance, msg=key)


needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")


@needs_deepspeed
@pytest.mark.slow
def test_runs_are_those_of_one_process_and_go_on_either_way(tmp_path):
    kinds = {"adapter": (1, "adapted"), "network": (2, "nafnet")}
    launch(tmp_path, [case(tmp_path / name, stage, "no", network, **TWO) for name, (stage, network) in kinds.items()])
    expected, again = {}, []
    for name, (stage, network) in kinds.items():
        under, alone = tmp_path / name, tmp_path / f"{name}-alone"
        expected[name] = run(alone, NETWORKS[network](), **ONE)
        assert_close(load_file(f"{under}.safetensors"), expected[name])
        assert_same_checkpoint(under, alone)
        for folder in (under, alone):
            shutil.rmtree(folder / "checkpoint-4")
        shutil.copytree(under, tmp_path / f"{name}-itself")
        assert_close(run(under, NETWORKS[network](), **ONE, **RESUMED), expected[name])
        again += [
            case(tmp_path / f"{name}-{of}", stage, "no", network, **TWO, **RESUMED) for of in ("alone", "itself")
        ]
    launch(tmp_path, again)
    for resumed in again:
        name = Path(resumed["folder"]).name.split("-")[0]
        assert_close(load_file(f"{resumed['folder']}.safetensors"), expected[name])
        assert_same_checkpoint(Path(resumed["folder"]), tmp_path / name)


@needs_deepspeed
@pytest.mark.slow
def test_bad_losses_and_gradients_stop_all_processes_before_the_step(tmp_path):
    """Number 9 is of step 2, on the second process."""
    broken = case(tmp_path / "nan", broken=[9], **TWO)
    infinite = {key: value for key, value in TWO.items() if key != "lr_warmup_steps"}
    at_start = [case(tmp_path / f"infinite{stage}", stage, network="infinite", **infinite) for stage in (1, 2)]
    # Gone on with, it stops before DeepSpeed has made a step.
    launch(tmp_path, [broken, *at_start, {**broken, "flags": {**TWO, **RESUMED}}])
    run(tmp_path / "alone", nafnet(), **ONE)
    assert_same_checkpoint(tmp_path / "nan", tmp_path / "alone", step=2)
    for rank in (0, 1):
        assert (tmp_path / f"nan-{rank}.txt").read_text().startswith("The loss became nan at step 2 ")
        for stage in (1, 2):
            assert "at step 0 (gradient norm inf)" in (tmp_path / f"infinite{stage}-{rank}.txt").read_text()
    for stage in (1, 2):
        (checkpoint,) = list_checkpoints(tmp_path / f"infinite{stage}")
        assert load_file(checkpoint / "model.safetensors")["weight"].item() == 0
        assert load_file(checkpoint / "optimizer.safetensors") == {}


@needs_deepspeed
@pytest.mark.slow
def test_bf16_is_autocast_as_without_deepspeed(tmp_path):
    """Over two steps: later, under DDP as well, a weight may be rounded to its other neighbour."""
    under, alone = tmp_path / "bf16", tmp_path / "alone"
    launch(tmp_path, [case(under, 2, "bf16", **{**TWO, "max_train_steps": 2, "lr_warmup_steps": 0})])
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        Accelerator(cpu=True, mixed_precision="bf16")
        expected = run(alone, nafnet(), **{**ONE, "max_train_steps": 2, "lr_warmup_steps": 0})
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert_close(load_file(f"{under}.safetensors"), expected)
    assert_same_checkpoint(under, alone, step=2)


@needs_deepspeed
@pytest.mark.slow
def test_buffers_are_those_of_the_main_process_whether_resumed_or_not(tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    launch(tmp_path, [case(whole, network="drifting", **TWO)])
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoint-4")
    launch(tmp_path, [case(resumed, network="drifting", **TWO, **RESUMED)])
    assert_equal(load_file(f"{resumed}.safetensors"), load_file(f"{whole}.safetensors"))


@needs_deepspeed
@pytest.mark.slow
def test_finetune_is_launched_or_refused_before_a_result_is_lost(train_dir, eval_dir, tiny_nafnet, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIG, "--num_processes", "1"]
    script = [EXAMPLES / "finetune.py", "--train_dir", train_dir, "--eval_dir", eval_dir]
    script += ["--model_name_or_path", tiny_nafnet, "--resolution", "32", "--per_device_train_batch_size", "2"]
    script += ["--max_train_steps", "2", "--output_dir", tmp_path / "out", "--overwrite_output_dir"]

    def run_with(*flags):
        command = map(str, [*launch, *flags, *script])
        return subprocess.run(list(command), capture_output=True, text=True, timeout=280)

    done = run_with()
    assert done.returncode == 0, done.stderr[-3000:]
    saved = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    # The same launch is one of DeepSpeed, and what it refuses costs no earlier result.
    refused = run_with("--zero_stage", "3")
    assert refused.returncode != 0 and "ZeRO stage 3 of DeepSpeed is not supported" in refused.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == saved


def launched(precision="no", backend=DynamoBackend.NO, **settings):
    return SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED,
        deepspeed_plugin=DeepSpeedPlugin(**settings),
        mixed_precision=precision,
        state=SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=backend)),
    )


@needs_deepspeed
def test_what_deepspeed_would_do_otherwise_is_refused(monkeypatch):
    for stage in (0, 3):
        with pytest.raises(ValueError, match=f"stage {stage} of DeepSpeed is not .* or launch with FSDP version 2"):
            check_zero(launched(zero_stage=stage))
    for stage, part in product((1, 2), ("optimizer", "param")):
        with pytest.raises(ValueError, match="Offloading"):
            check_zero(launched(zero_stage=stage, **{f"offload_{part}_device": "cpu"}))
    for precision in ("fp16", "fp8"):
        with pytest.raises(ValueError, match=f"{precision} under DeepSpeed is not supported"):
            check_zero(launched(precision, zero_stage=2))
    with pytest.raises(ValueError, match="torch.compile under DeepSpeed is not supported"):
        check_zero(launched(backend=DynamoBackend.INDUCTOR, zero_stage=2))
    for stage in (1, 2):
        check_zero(launched("bf16", zero_stage=stage))
    plain = launched(zero_stage=2)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "zero.json")
    with pytest.raises(ValueError, match="leave out `deepspeed_config_file`"):
        check_zero(plain)


@needs_deepspeed
def test_trained_parameters_must_be_float32():
    network = nn.Sequential(nn.Linear(2, 2).bfloat16().requires_grad_(False), nn.Linear(2, 2).bfloat16())
    with pytest.raises(ValueError, match="would train 1.weight, which is bfloat16"):
        ZeroEngine(network, torch.optim.AdamW(network[1].parameters()), None, None)


@needs_deepspeed
def test_versions_that_hide_bad_gradients_are_refused(monkeypatch):
    monkeypatch.setattr(zero, "version", lambda name: "0.18.9")
    with pytest.raises(ValueError, match="DeepSpeed 0.18.9 is too old"):
        check_zero(launched(zero_stage=2))


def test_the_multiple_of_a_network_is_found_under_an_engine():
    """An engine gives what it has not from its network, but its own `config`."""

    class DeepSpeedEngine(nn.Module):
        config = {"train_batch_size": 1}

        def __init__(self, module):
            super().__init__()
            self.module = module

    network = nn.Conv2d(3, 3, 1)
    network.config = SimpleNamespace(model_type="swin2sr", window_size=8)
    assert needed_multiple(DeepSpeedEngine(network)) == 8
