"""Kills a training run at random moments, resumes it each time, and compares its weights with an uninterrupted run's.

    python -m examples.experiments.resume.run

A tiny network is pre-trained on the CPU with accumulated batches, averaged weights and workers, over several epochs,
and killed with SIGKILL `--num_kills` times: most of them at a random moment of the steps between two checkpoints or of
the writing of one, the others while a run starts and loads. The script fails unless after every kill all checkpoints
can be read, the result is bitwise that of the uninterrupted run, and in the end no half-written checkpoint is left.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from colora_peft.models import NAFNetConfig
from colora_peft.training import list_checkpoints, read_state
from colora_peft.utils import check_at_least, flag, run_script, write_json

EXAMPLES = Path(__file__).parents[2]
_STEPS_BETWEEN_CHECKPOINTS = 3
_SHARE_KILLED_AT_START = 0.2
_POLL_SECONDS = 0.002


@dataclass
class KillArguments:
    """Flags of the experiment."""

    output_dir: str = flag("outputs/kill_and_resume", "New folder for both runs, their messages and the report.")
    num_kills: int = flag(20, "Number of times that the run is killed.")
    seed: int = flag(0, "Seed of the moments of the kills, and of the runs.")

    def __post_init__(self) -> None:
        check_at_least(self, "num_kills", 1)

    @property
    def max_train_steps(self) -> int:
        """Enough steps for all kills: each is aimed up to three checkpoints ahead."""
        return _STEPS_BETWEEN_CHECKPOINTS * (3 * self.num_kills + 4)


class Runs:
    """Starts the run in a folder, and kills it.

    Args:
        args: The experiment's flags.
        folder: Folder for the runs and the network's configuration.
    """

    def __init__(self, args: KillArguments, folder: Path) -> None:
        self.args = args
        self.folder = folder
        network = NAFNetConfig(width=8, encoder_blocks=(1, 1), middle_blocks=1, decoder_blocks=(1, 1))
        network.save_pretrained(folder / "network")

    def start(self, output_dir: Path) -> subprocess.Popen:
        """Begins the run, or goes on with it where it has a checkpoint."""
        flags = {
            "train_dir": EXAMPLES / "data" / "underwater" / "train" / "target",
            "config_name": self.folder / "network",
            "output_dir": output_dir,
            "max_train_steps": self.args.max_train_steps,
            "checkpointing_steps": _STEPS_BETWEEN_CHECKPOINTS,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "dataloader_num_workers": 1,
            "resolution": 32,
            "lr_warmup_steps": 5,
            "seed": self.args.seed,
        }
        command = [sys.executable, str(EXAMPLES / "pretrain.py"), "--use_ema"]
        command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        command += ["--resume_from_checkpoint", "latest"]
        with (self.folder / f"{output_dir.name}.txt").open("ab") as messages:
            # A session of its own: the kill reaches its workers, too, as when a machine fails.
            return subprocess.Popen(
                command,
                stdout=messages,
                stderr=messages,
                start_new_session=True,
                env={**os.environ, "ACCELERATE_USE_CPU": "true"},
            )

    def finish(self, output_dir: Path) -> tuple[float, float]:
        """Runs to the end; returns the seconds until the first new checkpoint, and between checkpoints after it."""
        first_step = _last_step(output_dir)
        started = time.monotonic()
        process = self.start(output_dir)
        while process.poll() is None and _last_step(output_dir) == first_step:
            time.sleep(_POLL_SECONDS)
        first_saved = time.monotonic()
        if process.wait() != 0:
            raise ChildProcessError(
                f"The run ended with {process.returncode}; see {self.folder / output_dir.name}.txt."
            )
        intervals = (self.args.max_train_steps - first_step) / _STEPS_BETWEEN_CHECKPOINTS
        return first_saved - started, (time.monotonic() - first_saved) / intervals

    def kill(self, output_dir: Path, checkpoints_ahead: int, delay_seconds: float) -> None:
        """Starts, waits for so many new checkpoints and then for so long, and kills."""
        wanted = _last_step(output_dir) + checkpoints_ahead * _STEPS_BETWEEN_CHECKPOINTS
        process = self.start(output_dir)
        while checkpoints_ahead and _last_step(output_dir) < wanted and process.poll() is None:
            time.sleep(_POLL_SECONDS)
        time.sleep(delay_seconds)
        if process.poll() is not None:
            raise ChildProcessError(f"The run ended before it was killed; see {self.folder / output_dir.name}.txt.")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _last_step(output_dir: Path) -> int:
    return max((int(path.name.rpartition("-")[2]) for path in list_checkpoints(output_dir)), default=0)


def check_checkpoints(output_dir: Path) -> None:
    """Reads every file of every checkpoint.

    Raises:
        ValueError: A file cannot be read; names it.
    """
    for checkpoint in list_checkpoints(output_dir):
        read_state(checkpoint)
        for name in ("model", "optimizer", "ema"):
            file = checkpoint / f"{name}.safetensors"
            try:
                load_file(file)
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"{file} cannot be read after a kill ({error}): checkpoints are not whole."
                ) from error


def differing_tensors(one: Path, other: Path) -> list[str]:
    """The tensors of two files that are not bitwise equal, or that only one of them has."""
    first, second = load_file(one), load_file(other)
    return sorted(
        name
        for name in first.keys() | second.keys()
        if name not in first or name not in second or not torch.equal(first[name], second[name])
    )


def main(args: KillArguments) -> None:
    """Runs the training uninterrupted, then with kills, and compares the two."""
    folder = Path(args.output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output_dir {folder} is there already; choose a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    runs, moments = Runs(args, folder), random.Random(args.seed)
    whole, killed = folder / "uninterrupted", folder / "killed"
    seconds_to_start, seconds_between = runs.finish(whole)
    print(f"Uninterrupted: {args.max_train_steps} steps, {seconds_to_start:.1f} s to start.", flush=True)
    kills = []
    for number in range(1, args.num_kills + 1):
        before = _last_step(killed)
        if moments.random() < _SHARE_KILLED_AT_START:
            ahead, delay = 0, moments.uniform(0.5, 0.95) * seconds_to_start
        else:
            ahead, delay = moments.choice((1, 2)), moments.uniform(0, seconds_between)
        runs.kill(killed, ahead, delay)
        check_checkpoints(killed)
        half_written = sorted(path.name for path in killed.glob(".*.partial"))
        kills.append({"resumed_at": before, "last_checkpoint": _last_step(killed), "half_written": half_written})
        print(f"Kill {number}: resumed at {before}, last checkpoint {_last_step(killed)} {half_written}", flush=True)
    runs.finish(killed)
    check_checkpoints(killed)
    last = f"checkpoint-{args.max_train_steps}"
    different = {
        name: differing_tensors(whole / name, killed / name)
        for name in ("model.safetensors", *(f"{last}/{file}.safetensors" for file in ("optimizer", "ema")))
    }
    left = sorted(path.name for path in killed.glob(".checkpoint*"))
    write_json(folder / "report.json", {"kills": kills, "different_tensors": different, "left": left})
    if any(different.values()) or left:
        raise ValueError(f"The runs differ in {different}, and {left} are left over: resuming is not exact.")
    print(f"{args.num_kills} kills, {args.num_kills} resumes: all weights, moments and averages are bitwise equal.")


if __name__ == "__main__":
    run_script(main, KillArguments)
