"""A network that is sharded over two processes trains, saves and resumes as a whole one. On a CPU Accelerate does not
shard; here `fully_shard` of PyTorch does it in its place."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from support.examples import TESTS
from support.fsdp import assert_close
from support.loop import assert_equal, nafnet, run
from torch import nn

from colora_peft.training.fsdp import WholeNetwork, check_distributed_type
from colora_peft.utils.distributed import fill, whole

SHARDED = """
import json, os, sys
from types import SimpleNamespace
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
sys.path.insert(0, {tests!r})
from safetensors.torch import save_file
from support.loop import NoisyPatches, arguments, nafnet
from colora_peft.training import check_output_dir, open_output_dir
from colora_peft.training import train
args, accelerator = arguments(sys.argv[1], **json.loads(sys.argv[2])), Accelerator()
assert accelerator.num_processes == 2
def shard(model, optimizer):
    names = {{id(parameter): name for name, parameter in model.named_parameters()}}
    mesh = init_device_mesh("cpu", (2,))
    for module in list(model.modules()):
        if type(module).__name__ == "NAFBlock":
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    sharded = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [sharded[names[id(parameter)]] for parameter in group["params"]]
    return model, AcceleratedOptimizer(optimizer)
accelerator.prepare = shard
accelerator.state.distributed_type = DistributedType.FSDP
accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=2)
checkpoint = check_output_dir(args)
with open_output_dir(args, accelerator, checkpoint):
    trained, _ = train(nafnet(), NoisyPatches(), args, accelerator, checkpoint)
assert all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in trained.state_dict().values())
if accelerator.is_main_process:
    save_file({{name: tensor.contiguous() for name, tensor in trained.state_dict().items()}}, sys.argv[3])
torch.distributed.barrier()
os._exit(0)  # ending the gloo group may deadlock
"""


def train_sharded(tmp_path, folder, **flags):
    script, result = tmp_path / "script.py", tmp_path / "result.safetensors"
    script.write_text(SHARDED.format(tests=str(TESTS)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(folder), json.dumps(flags), str(result)],
        capture_output=True, text=True, timeout=280, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(result)


@pytest.mark.slow
def test_a_sharded_run_is_that_of_a_whole_network_and_resumes_either_way(tmp_path):
    flags = {"max_train_steps": 4, "checkpointing_steps": 2, "use_ema": True, "ema_decay": 0.6}
    expected = run(tmp_path / "one", nafnet(), per_device_train_batch_size=2, **flags)
    sharded = tmp_path / "sharded"
    assert_close(train_sharded(tmp_path, sharded, per_device_train_batch_size=1, **flags), expected)
    for name in ("model", "optimizer", "ema"):
        files = [folder / "checkpoint-4" / f"{name}.safetensors" for folder in (tmp_path / "one", sharded)]
        assert_close(*map(load_file, files))
    for folder in (tmp_path / "one", sharded):
        shutil.rmtree(folder / "checkpoint-4")
    flags["resume_from_checkpoint"] = "latest"
    assert_close(run(sharded, nafnet(), per_device_train_batch_size=2, **flags), expected)
    assert_close(train_sharded(tmp_path, tmp_path / "one", per_device_train_batch_size=1, **flags), expected)


def launched(kind, is_fsdp2=False):
    return SimpleNamespace(distributed_type=kind, is_fsdp2=is_fsdp2)


def test_launches_that_cannot_be_resumed_are_refused():
    with pytest.raises(ValueError, match="under MEGATRON_LM is not supported: launch with DDP"):
        check_distributed_type(launched(DistributedType.MEGATRON_LM))
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        check_distributed_type(launched(DistributedType.FSDP))
    for accelerator in (launched(DistributedType.FSDP, True), launched(DistributedType.MULTI_GPU)):
        check_distributed_type(accelerator)


def test_what_is_not_sharded_is_taken_as_it_is():
    tensor = torch.rand(3)
    assert whole(tensor) is tensor
    target = torch.zeros(3, requires_grad=True)
    fill(target, tensor)
    assert torch.equal(target.detach(), tensor) and target.grad_fn is None
    model = nn.Linear(2, 2)
    assert WholeNetwork(model, launched(DistributedType.MULTI_GPU)).get(model) is model


def test_the_copy_of_a_sharded_network_follows_it():
    model = nn.BatchNorm1d(2)
    network = WholeNetwork(model, launched(DistributedType.FSDP, True))
    model(torch.rand(4, 2))
    nn.init.constant_(model.weight, 3)
    copied = network.get(model)
    assert copied is not model and copied is network.get(model)
    assert_equal(copied.state_dict(), model.state_dict())
