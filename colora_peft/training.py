"""The training loop of `examples/pretrain.py` and `examples/finetune.py`, on Accelerate.

A run is counted in optimiser steps. The samples of a step and the learning rate are functions of its number
(`colora_peft.patches`), so a checkpoint is weights, Adam's moments and one integer, and a resumed run goes on exactly
where it stopped: bitwise on one CPU set-up, up to the non-determinism of its kernels on a GPU.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
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

from .checkpoint import load_checkpoint, read_state, save_checkpoint
from .files import write_text
from .patches import StepSampler, sample_generator
from .train_arguments import TrainArguments

_LOG_FILE = "train_log.jsonl"
_LOG_EVERY_STEPS = 20


class TrainingDiverged(RuntimeError):
    """The loss or its gradient became NaN or infinite."""


def reconstruct(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """The restored pictures (B, C, H, W) of any network that returns them as a tensor or under `reconstruction`.

    Raises:
        TypeError: if the network returns something else.
        ValueError: if the restored pictures are not of the shape of the input.
    """
    output = model(pixel_values)
    reconstruction = output if isinstance(output, Tensor) else getattr(output, "reconstruction", None)
    if not isinstance(reconstruction, Tensor):
        raise TypeError(
            f"{type(model).__name__} returned {type(output).__name__}; a restoration network must return the restored "
            "pictures as a tensor or as an output with the field `reconstruction`."
        )
    if reconstruction.shape != pixel_values.shape:
        raise ValueError(
            f"{type(model).__name__} returned pictures of shape {tuple(reconstruction.shape)} for inputs of shape "
            f"{tuple(pixel_values.shape)}; a restoration network must keep the shape."
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
        args: The run's settings; its output folder was made by `create_output_dir`.
        accelerator: Gives device, mixed precision and processes.
        checkpoint: Where to go on from; None starts anew.

    Returns:
        The model, on the accelerator's device, and the seconds of training, those before a restart included.

    Raises:
        TrainingDiverged: if loss or gradient is not finite. The state before that step was saved as a checkpoint.
        ValueError: if the checkpoint belongs to another model, or the global batch has changed.
    """
    model = _to_device(model, accelerator.device).train()
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
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        figures = _backward(prepared, batch, parameters, args.max_grad_norm, accelerator)
        if not figures.finite:
            for buffer, before in buffers:  # running statistics have seen the bad batch already
                buffer.copy_(before)
            run.save(model, optimizer, step)
            raise TrainingDiverged(
                f"The loss became {figures.loss:g} at step {step} (gradient norm {figures.norm:g}). Training stopped; "
                f"the state before that step is in {run.save_last_good(model)}. Look for broken pictures, or start "
                f"again with a lower --learning_rate than {args.learning_rate:g}."
            )
        optimizer.step()
        optimizer.zero_grad()
        run.log(step, figures)
        done = step + 1
        if done % args.checkpointing_steps == 0 or done == args.max_train_steps:
            run.save(model, optimizer, done)
    return accelerator.unwrap_model(prepared, keep_fp32_wrapper=False), run.seconds


def _to_device(model: nn.Module, device: torch.device) -> nn.Module:
    # Convolutions and channel-wise norms are faster with the channels last, on CPU and GPU. PyTorch refuses that
    # layout for the five dimensions of Conv3d.
    if any(tensor.ndim == 5 for tensor in (*model.parameters(), *model.buffers())):
        return model.to(device)
    return model.to(device, memory_format=torch.channels_last)


@dataclass(frozen=True)
class _StepFigures:
    """What a step gave over all processes: mean loss, mean PSNR (dB), norm of the gradient before clipping."""

    loss: float
    psnr: float
    norm: float
    finite: bool


def _backward(
    model: nn.Module,
    batch: dict[str, Tensor],
    parameters: list[nn.Parameter],
    max_grad_norm: float,
    accelerator: Accelerator,
) -> _StepFigures:
    """Forward and backward of one batch; leaves clipped gradients. Every process gets the same figures."""
    reconstruction = reconstruct(model, batch["pixel_values"])
    loss = F.l1_loss(reconstruction, batch["labels"])
    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(parameters, max_grad_norm)
    error = (reconstruction.detach().float().clamp(0, 1) - batch["labels"]).square().mean(dim=(1, 2, 3))
    psnr = -10 * error.clamp_min(1e-10).log10().mean()
    # The mean over the processes: a loss that is NaN on one of them (its gradient need not be) stops them all.
    local = torch.stack([loss.detach().float(), psnr, norm.detach().float()])
    mean_loss, mean_psnr, mean_norm = accelerator.reduce(local, reduction="mean").tolist()
    # Under fp16 an infinite norm is the scaler's business: it skips the step and lowers its scale.
    finite = math.isfinite(mean_loss) and (accelerator.scaler is not None or math.isfinite(mean_norm))
    return _StepFigures(mean_loss, mean_psnr, mean_norm, finite)


def use_all_cores(accelerator: Accelerator) -> None:
    """On a CPU, share its physical cores among the processes of this machine.

    `accelerate launch` sets OMP_NUM_THREADS to 1 unless told otherwise, so that the other cores would idle.
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
        saved = read_state(checkpoint)
        precision = saved.get("mixed_precision", self.accelerator.mixed_precision)
        if precision != self.accelerator.mixed_precision:
            raise ValueError(
                f"{checkpoint} was trained with --mixed_precision {precision}, this run has "
                f"{self.accelerator.mixed_precision}; launch it with the same."
            )
        batch_size = saved.get("global_batch_size")
        if batch_size != self.global_batch_size:
            raise ValueError(
                f"{checkpoint} was trained with {batch_size} patches a step over all processes, this run has "
                f"{self.global_batch_size}; set --per_device_train_batch_size so that they are equal."
            )
        state = load_checkpoint(checkpoint, model, optimizer)
        self.earlier_seconds = state.get("seconds", 0.0)
        self._resume_scaler(state)
        if self.accelerator.is_main_process and self.log_path.is_file():
            _cut_log(self.log_path, state["step"])
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

    def log(self, step: int, figures: _StepFigures) -> None:
        """Remember loss and PSNR of the step; every so often show and write their mean."""
        self.recent.append((figures.loss, figures.psnr))
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
        if self.accelerator.is_main_process:
            state = {
                "step": step,
                "seconds": self.seconds,
                "global_batch_size": self.global_batch_size,
                "mixed_precision": self.accelerator.mixed_precision,
                "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
                "arguments": asdict(self.args),
            }
            inner = getattr(optimizer, "optimizer", optimizer)
            save_checkpoint(self.args.output_dir, model, inner, state, self.args.checkpoints_total_limit or None)
        # A process that ended earlier would have the launcher kill the one that writes.
        self.accelerator.wait_for_everyone()

    def save_last_good(self, model: nn.Module) -> Path:
        """After a divergence: the network as a user loads it, where it knows how to save itself, and where that is."""
        folder = Path(self.args.output_dir) / "last_good"
        if not hasattr(model, "save_pretrained"):
            return folder.parent
        if self.accelerator.is_main_process:
            model.save_pretrained(folder)
        self.accelerator.wait_for_everyone()
        return folder

    def _resume_scaler(self, state: dict[str, Any]) -> None:
        # Under fp16 the scale of the loss was found over many steps; without it a resumed run would skip some.
        if self.accelerator.scaler is not None and state.get("scaler"):
            self.accelerator.scaler.load_state_dict(state["scaler"])


def _cut_log(path: Path, last_step: int) -> None:
    """Drop the rows after `last_step`, and a last row that a killed run left half-written."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] > last_step:
                break
        except json.JSONDecodeError:
            break
        kept.append(f"{line}\n")
    write_text(path, "".join(kept))
