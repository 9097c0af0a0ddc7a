"""The training loop of `examples/pretrain.py` and `examples/finetune.py`, on Accelerate.

A run is counted in optimiser steps. The samples of a step and the learning rate are functions of its number
(`colora_peft.patches`), so a checkpoint is weights, Adam's moments and one integer, and a resumed run goes on exactly
where it stopped.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import psutil
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .checkpoint import list_checkpoints, load_checkpoint, read_state, save_checkpoint, write_json
from .patches import StepSampler, sample_generator

_RUN_FILE, _LOG_FILE = "run.json", "train_log.jsonl"
_LOG_EVERY_STEPS = 20


class TrainingDiverged(RuntimeError):
    """The loss or its gradient became NaN or infinite."""


@dataclass
class TrainArguments:
    """Flags that every training script has. Names follow the scripts of diffusers."""

    output_dir: str = field(metadata={"help": "Folder for checkpoints, logs and the result."})
    max_train_steps: int = field(metadata={"help": "Optimiser steps of the whole run."})
    per_device_train_batch_size: int = field(metadata={"help": "Patches a step on each process."})
    resolution: int = field(metadata={"help": "Side of the square training patches in pixels."})
    learning_rate: float = field(metadata={"help": "Peak learning rate of AdamW; it decays to zero along a cosine."})
    lr_warmup_steps: int = field(default=0, metadata={"help": "Steps over which the learning rate rises from zero."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    seed: int = field(default=0, metadata={"help": "Seed of everything random; the same seed, the same result."})
    checkpointing_steps: int = field(default=500, metadata={"help": "Steps between checkpoints."})
    checkpoints_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept; older ones go."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "'latest' or the folder of a checkpoint: go on from there."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Delete an earlier run in --output_dir."})
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "Processes that prepare patches; 0 prepares them in the training process."}
    )

    def __post_init__(self) -> None:
        for name in ("max_train_steps", "per_device_train_batch_size", "resolution", "checkpointing_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"--learning_rate must be a positive number, got {self.learning_rate}.")
        if self.checkpoints_total_limit is not None and self.checkpoints_total_limit < 1:
            raise ValueError("--checkpoints_total_limit must be at least 1; leave it out to keep all.")

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine that reaches zero after the last step."""
        if step < self.lr_warmup_steps:
            return self.learning_rate * (step + 1) / self.lr_warmup_steps
        progress = (step - self.lr_warmup_steps) / max(1, self.max_train_steps - self.lr_warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


# --------------------------------------------------------------------------------------------------- output folder


def prepare_output_dir(args: TrainArguments, accelerator: Accelerator) -> Path | None:
    """Create the output folder or refuse it; return the checkpoint to resume from, if any.

    Raises:
        ValueError: if the folder already holds a run and neither resuming nor overwriting was asked for, if it holds
            other files, if there is nothing to resume from, or if the run to resume had other settings.
    """
    output_dir = Path(args.output_dir)
    if args.resume_from_checkpoint is not None:
        checkpoint = _find_checkpoint(args, output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        return checkpoint
    if accelerator.is_main_process:
        _create_output_dir(args, output_dir)
    accelerator.wait_for_everyone()
    return None


def _create_output_dir(args: TrainArguments, output_dir: Path) -> None:
    occupied = output_dir.is_dir() and any(output_dir.iterdir())
    if occupied and not (output_dir / _RUN_FILE).is_file():
        raise ValueError(f"--output_dir {output_dir} holds files that are not of a run; choose another folder.")
    if occupied and not args.overwrite_output_dir:
        raise ValueError(
            f"--output_dir {output_dir} already holds a run; add --overwrite_output_dir to delete it or "
            "--resume_from_checkpoint latest to go on with it."
        )
    if occupied:
        shutil.rmtree(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / _RUN_FILE, asdict(args))


def _find_checkpoint(args: TrainArguments, output_dir: Path) -> Path:
    if args.resume_from_checkpoint == "latest":
        checkpoints = list_checkpoints(output_dir)
        if not checkpoints:
            raise ValueError(f"--resume_from_checkpoint latest: there is no checkpoint in {output_dir}.")
        path = checkpoints[-1]
    else:
        path = Path(args.resume_from_checkpoint)
    saved = read_state(path)["arguments"]
    # What may differ without changing the result.
    free = {"output_dir", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint"}
    free |= {"overwrite_output_dir", "dataloader_num_workers", "per_device_train_batch_size"}
    changed = [
        f"--{key} was {saved[key]!r}" for key, now in asdict(args).items() if key not in free and saved[key] != now
    ]
    if changed:
        raise ValueError(f"{path} is from a run with other settings ({'; '.join(changed)}); use the same ones.")
    return path


# ------------------------------------------------------------------------------------------------------ the loop


def reconstruct(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """The restored pictures (B, C, H, W) of any network that returns them as a tensor or under `reconstruction`.

    Raises:
        TypeError: if the network returns something else.
    """
    output = model(pixel_values)
    reconstruction = output if isinstance(output, Tensor) else getattr(output, "reconstruction", None)
    if not isinstance(reconstruction, Tensor):
        raise TypeError(
            f"{type(model).__name__} returned {type(output).__name__}; a restoration network must return the restored "
            "pictures as a tensor or as an output with the field `reconstruction`."
        )
    return reconstruction


def restoration_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean absolute error between the restored `pixel_values` and `labels`: the loss of training and of the scores."""
    return F.l1_loss(reconstruct(model, batch["pixel_values"]), batch["labels"])


def train(
    model: nn.Module, dataset: Dataset, args: TrainArguments, accelerator: Accelerator, checkpoint: Path | None = None
) -> tuple[nn.Module, float]:
    """Train the parameters of `model` that require gradients.

    Args:
        model: Any network that `reconstruct` understands.
        dataset: Samples `{"pixel_values", "labels"}` by sample number, e.g. `PairedPatches`.
        args: The run's settings; its output folder was made by `prepare_output_dir`.
        accelerator: Gives device, mixed precision and processes.
        checkpoint: Where to go on from; None starts anew.

    Returns:
        The model, on the accelerator's device, and the seconds of training, those before a restart included.

    Raises:
        TrainingDiverged: if loss or gradient is not finite. The state before that step was saved as a checkpoint.
        ValueError: if the checkpoint belongs to another model, or the global batch has changed.
    """
    # Convolutions and channel-wise norms are faster with the channels last, on CPU and GPU.
    model = model.to(accelerator.device, memory_format=torch.channels_last).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0)
    run = _Run(args, accelerator)
    first_step = run.resume(model, optimizer, checkpoint)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    batches = _batches(dataset, args, accelerator, first_step)
    steps = range(first_step, args.max_train_steps)
    for step, batch in zip(steps, run.progress(batches, first_step), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate_at(step)
        # Dropout and the like draw from the global generator: seeded by step, a resumed run draws the same.
        torch.manual_seed(sample_generator(args.seed, step, accelerator.process_index).initial_seed())
        reconstruction = reconstruct(prepared, batch["pixel_values"])
        loss = F.l1_loss(reconstruction, batch["labels"])
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
        # Under fp16 an infinite norm is the scaler's business: it skips the step and lowers its scale.
        if not torch.isfinite(loss) or (accelerator.scaler is None and not torch.isfinite(norm)):
            run.save(model, optimizer, step)
            raise TrainingDiverged(
                f"The loss became {loss.item():g} at step {step} (gradient norm {norm.item():g}). Training stopped; "
                f"the state before it is saved in {args.output_dir}. Lower --learning_rate {args.learning_rate:g}."
            )
        optimizer.step()
        optimizer.zero_grad()
        run.log(step, loss, reconstruction, batch["labels"])
        done = step + 1
        if done % args.checkpointing_steps == 0 or done == args.max_train_steps:
            run.save(model, optimizer, done)
    return accelerator.unwrap_model(prepared, keep_fp32_wrapper=False), run.seconds


def use_all_cores(accelerator: Accelerator) -> None:
    """On a CPU, share its physical cores among the processes of this machine.

    `accelerate launch` sets OMP_NUM_THREADS to 1 unless told otherwise, which halves the speed of a laptop or worse.
    Any other value is somebody's choice and is kept.
    """
    if accelerator.device.type != "cpu" or os.environ.get("OMP_NUM_THREADS") != "1":
        return
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, cores // processes_here))


def _batches(
    dataset: Dataset, args: TrainArguments, accelerator: Accelerator, first_step: int
) -> Iterable[dict[str, Tensor]]:
    sampler = StepSampler(
        first_step,
        args.max_train_steps,
        args.per_device_train_batch_size,
        accelerator.process_index,
        accelerator.num_processes,
    )
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=_one_thread,
    )
    for batch in loader:
        yield {key: value.to(accelerator.device, non_blocking=True) for key, value in batch.items()}


def _one_thread(_worker: int) -> None:
    # Workers share the cores; OpenCV would start a thread for each in every one of them.
    cv2.setNumThreads(1)


class _Run:
    """What a run shows and writes: progress bar, log and checkpoints, all on the main process."""

    def __init__(self, args: TrainArguments, accelerator: Accelerator) -> None:
        self.args = args
        self.accelerator = accelerator
        self.log_path = Path(args.output_dir) / _LOG_FILE
        self.recent: list[tuple[float, float]] = []
        self.started = time.perf_counter()
        self.earlier_seconds = 0.0
        self.bar: tqdm | None = None

    @property
    def global_batch_size(self) -> int:
        return self.args.per_device_train_batch_size * self.accelerator.num_processes

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path | None) -> int:
        if checkpoint is None:
            return 0
        state = load_checkpoint(checkpoint, model, optimizer)
        if state["global_batch_size"] != self.global_batch_size:
            raise ValueError(
                f"{checkpoint} was trained with {state['global_batch_size']} patches a step over all processes, this "
                f"run has {self.global_batch_size}; set --per_device_train_batch_size so that they are equal."
            )
        self.earlier_seconds = state["seconds"]
        if self.accelerator.is_main_process and self.log_path.is_file():
            lines = self.log_path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if json.loads(line)["step"] <= state["step"]]
            self.log_path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        return state["step"]

    def progress(self, batches: Iterable[Any], first_step: int) -> Iterable[Any]:
        self.bar = tqdm(
            batches,
            total=self.args.max_train_steps,
            initial=first_step,
            desc="training",
            unit="step",
            disable=not self.accelerator.is_main_process,
        )
        return self.bar

    def log(self, step: int, loss: Tensor, reconstruction: Tensor, labels: Tensor) -> None:
        """Remember loss and PSNR of the step; every so often show and write their mean."""
        error = (reconstruction.detach().clamp(0, 1) - labels).square().mean(dim=(1, 2, 3)).clamp_min(1e-10)
        self.recent.append((loss.item(), -10 * error.log10().mean().item()))
        if (step + 1) % _LOG_EVERY_STEPS and step + 1 < self.args.max_train_steps:
            return
        mean_loss, mean_psnr = (sum(column) / len(column) for column in zip(*self.recent, strict=True))
        self.recent.clear()
        self.bar.set_postfix(loss=f"{mean_loss:.4f}", psnr=f"{mean_psnr:.2f} dB", refresh=False)
        if self.accelerator.is_main_process:
            row = {"step": step + 1, "loss": mean_loss, "psnr": mean_psnr, "seconds": round(self.seconds, 2)}
            row["learning_rate"] = self.args.learning_rate_at(step)
            with self.log_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    @property
    def seconds(self) -> float:
        return self.earlier_seconds + time.perf_counter() - self.started

    def save(self, model: nn.Module, optimizer: Any, step: int) -> None:
        if not self.accelerator.is_main_process:
            return
        state = {
            "step": step,
            "seconds": self.seconds,
            "global_batch_size": self.global_batch_size,
            "arguments": asdict(self.args),
        }
        inner = getattr(optimizer, "optimizer", optimizer)
        save_checkpoint(self.args.output_dir, model, inner, state, self.args.checkpoints_total_limit)
