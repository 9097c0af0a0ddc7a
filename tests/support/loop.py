"""Helpers shared by tests: those of training/test_loop.py."""

import json
import os
import subprocess
import sys

import torch
from accelerate import Accelerator
from support.examples import TESTS
from torch import nn

from colora_peft.data.patches import PatchDataset
from colora_peft.models import NAFNetConfig, NAFNetForImageRestoration
from colora_peft.training.loop import (
    TrainArguments,
    train,
)
from colora_peft.training.output_dir import check_output_dir, open_output_dir


class NoisyPatches(PatchDataset):
    """Five images of noise, the clean one half as bright; images at the numbers in `broken` hold NaN."""

    def __init__(self, seed=0, broken=()):
        super().__init__(length=5, resolution=8, seed=seed)
        self.broken = set(broken)

    def __getitem__(self, number):
        sample = super().__getitem__(number)
        if number in self.broken:
            sample["labels"][:] = float("nan")
        return sample

    def sample(self, index, generator):
        clean = torch.rand(3, 8, 8, generator=generator) * (index + 1) / 5
        return clean, clean / 2


def nafnet(levels=2):
    torch.manual_seed(0)
    tiny = NAFNetConfig(width=8, encoder_blocks=(1,) * levels, middle_blocks=1, decoder_blocks=(1,) * levels)
    return NAFNetForImageRestoration(tiny)


def plain():
    """A network of running statistics and dropout, that returns a tensor."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.3), nn.Conv2d(8, 3, 1))


def arguments(folder, **settings):
    sizes = {"max_train_steps": 6, "per_device_train_batch_size": 2, "resolution": 8, "learning_rate": 0.01}
    return TrainArguments(output_dir=str(folder), **(sizes | settings))


def run(folder, model, dataset=None, **settings):
    args, accelerator = arguments(folder, **settings), Accelerator(cpu=True)
    checkpoint = check_output_dir(args)
    with open_output_dir(args, accelerator, checkpoint):
        trained, _ = train(model, dataset or NoisyPatches(), args, accelerator, checkpoint)
    return trained.state_dict()


def rows(folder, log="train_log.jsonl"):
    return [json.loads(line) for line in (folder / log).read_text().splitlines()]


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


class Killed(Exception):
    pass


class DiesAt(NoisyPatches):
    """Raises when the sample of this number is asked for, as a kill would end the run there."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def __getitem__(self, number):
        if number == self.number:
            raise Killed
        return super().__getitem__(number)


TWO_PROCESSES = """
import json
import os
import signal
import sys
from pathlib import Path
from accelerate import Accelerator
sys.path.insert(0, {tests!r})
from support.loop import NoisyPatches, arguments, nafnet
from colora_peft.data import PairedImageFolder, PairSubset
from colora_peft.training import check_output_dir, open_output_dir
from colora_peft.training import TrainingDiverged, TrainingStopped, train
folder, what = sys.argv[1], json.loads(sys.argv[2])
class Patches(NoisyPatches):
    def __getitem__(self, number):
        if number == what["signal_at"]:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(number)
flags = dict(max_train_steps=4, per_device_train_batch_size=1) | what["flags"]
args, accelerator = arguments(folder, **flags), Accelerator()
assert accelerator.num_processes == 2
checkpoint = check_output_dir(args)
pairs = PairedImageFolder(what["eval_dir"]) if what["eval_dir"] else None
pairs = pairs and PairSubset(pairs, range(what["eval_count"]))
try:
    with open_output_dir(args, accelerator, checkpoint):
        train(nafnet(), Patches(broken=what["broken"]), args, accelerator, checkpoint, pairs)
except (TrainingDiverged, TrainingStopped) as error:
    # A file each: what two processes print may come out interleaved.
    file = Path(args.output_dir).with_name(f"stopped{{accelerator.process_index}}")
    file.write_text(f"{{type(error).__name__}} {{error}}")
accelerator.end_training()
"""


def launch_two(tmp_path, folder, broken=(), signal_at=None, eval_dir=None, eval_count=1, **flags):
    """Runs the script above on two processes; a sample may be broken, or ask its process to stop."""
    what = {"broken": broken, "signal_at": signal_at, "eval_dir": eval_dir, "eval_count": eval_count, "flags": flags}
    argv = str(folder), json.dumps(what)
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES.format(tests=str(TESTS)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), *argv]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]


class InfiniteGradient(nn.Module):
    """The loss is finite at the start, its gradient is not."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x + self.weight.sqrt()


class FailsAt(NoisyPatches):
    """Raises what a server that is away, or a worker that was killed, does when a sample is asked for."""

    def __init__(self, number, error):
        super().__init__()
        self.number, self.error = number, error

    def __getitem__(self, number):
        if number == self.number:
            raise self.error
        return super().__getitem__(number)
