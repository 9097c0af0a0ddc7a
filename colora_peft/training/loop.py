"""The training loop of `examples/pretrain.py` and `examples/finetune.py`, on Accelerate.

A run is counted in optimiser steps. The samples of a step and the learning rate are functions of its number
(`colora_peft.data.patches`), so a checkpoint is weights, Adam's moments, their averages and one integer, and a
resumed run goes on exactly where it stopped: bitwise on one CPU set-up, up to the non-determinism of its kernels on a
GPU.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import cv2
import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from colora_peft.data import Batch, PairSource, Position, StepSampler, collate, sample_generator
from colora_peft.inference import reconstruct, tile_multiple
from colora_peft.utils import Processes

from .arguments import TrainArguments
from .engine import Engine
from .engine_deepspeed import ZeroEngine, is_zero
from .fsdp import WholeNetwork, is_sharding
from .loss import TrainingLoss
from .run import StepFigures, TrainingRun
from .signals import STOP_SIGNALS, StopSignals, ignore_stop_signals
from .trackers import running_trackers


class TrainingDiverged(RuntimeError):
    """The loss or its gradient became NaN or infinite."""


class DataFailed(RuntimeError):
    """The next batch is not available: its images cannot be read, or the process that prepares them is gone."""


def train(
    model: nn.Module,
    dataset: Dataset,
    args: TrainArguments,
    accelerator: Accelerator,
    checkpoint: Path | None = None,
    eval_pairs: PairSource | None = None,
) -> tuple[nn.Module, float]:
    """Trains the parameters of `model` that require gradients.

    Args:
        model: Any network that `reconstruct` understands.
        dataset: Samples `{"pixel_values", "labels"}` by sample number, e.g. `PairedPatches`, or a `StreamPatches`.
        args: The run's settings; its output folder was opened by `open_output_dir`.
        accelerator: That of `create_accelerator`, which refuses launches under which a run would be wrong.
        checkpoint: Checkpoint to go on from; None starts a new run.
        eval_pairs: Pairs to evaluate every `validation_steps`, if that is set.

    Returns:
        The model, on the accelerator's device, and the seconds of training, those before a restart included. Under
        `use_ema` its trained parameters are the averages.

    Raises:
        TrainingDiverged: if loss or gradient is not finite. The state before that step was saved as a checkpoint.
        DataFailed: if the next batch could not be had. In a run of one process the state is saved as a checkpoint.
        TrainingStopped: if SIGTERM or SIGINT came; the state is saved as a checkpoint. It ends the process.
        ValueError: if the checkpoint belongs to another model or dataset, the global batch has changed, there is
            nothing to validate on, or too many images cannot be used (`TooManySkipped`).
        OSError: if a checkpoint cannot be written.
    """
    if args.validation_steps and eval_pairs is None:
        raise ValueError("--validation_steps needs images to evaluate on, and there are none; leave it out.")
    if args.save_best and not hasattr(model, "save_pretrained"):
        raise ValueError(f"--save_best needs a network with save_pretrained, which {type(model).__name__} has not.")
    model = _to_device(model, accelerator).train()
    network = WholeNetwork(model, accelerator)
    loss_of = TrainingLoss(args.checkerboard_weight, tile_multiple(model))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0)
    engine = (ZeroEngine if is_zero(accelerator) else Engine)(model, optimizer, args, accelerator)
    run = TrainingRun(model, engine, args, accelerator, dataset, network)
    first_step = run.resume(checkpoint)
    # The signals first: workers of the data loader that are forked must not have handlers of somebody else.
    batches, progress = _batches(dataset, args, accelerator, first_step, run.position), run.progress(first_step)
    with (
        StopSignals() as signals,
        running_trackers(accelerator, args),
        progress,
        closing(batches),
    ):
        for step in range(first_step, args.max_train_steps):
            engine.set_learning_rate(args.learning_rate_at(step))
            # Dropout and the like draw from the global generator: seeded by step, a resumed run draws the same.
            torch.manual_seed(sample_generator(args.seed, step, accelerator.process_index).initial_seed())
            buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
            try:
                figures = _backward(engine, batches, loss_of, args, accelerator, signals)
            except DataFailed as error:
                _put_back(buffers)
                _stop_without_data(run, step, first_step, error)
            if not figures.finite:
                _put_back(buffers)
                _stop_diverged(run, step, figures)
            engine.step()
            _after_step(run, step + 1, figures, eval_pairs)
    if run.averages is not None:
        run.averages.copy_to_model()
    engine.release()
    return network.get(model), run.seconds


def _after_step(run: TrainingRun, done: int, figures: StepFigures, eval_pairs: PairSource | None) -> None:
    run.finish_step(done, figures)
    if figures.stop_signal is not None:  # whoever sends it does not wait for an evaluation
        run.stop(figures.stop_signal, done)
    # Evaluated before it is saved: a run that is killed in between does it again, and none is missing.
    if run.args.is_due(run.args.validation_steps, done):
        run.validate(eval_pairs, done)
    if run.args.is_due(run.args.checkpointing_steps, done):
        run.save(done)


def _put_back(buffers: list[tuple[Tensor, Tensor]]) -> None:
    """Puts back the running statistics, which the batches of a failed step have changed."""
    for buffer, before in buffers:
        buffer.copy_(before)


def _stop_without_data(run: TrainingRun, step: int, first_step: int, error: DataFailed) -> None:
    """Saves the state after the steps so far, unless waiting processes would have to help, and raises."""
    if step == first_step:
        raise error
    if run.accelerator.num_processes > 1:
        raise DataFailed(f"{error} Go on from the last checkpoint with --resume_from_checkpoint latest.") from error
    checkpoint = run.save(step)
    raise DataFailed(
        f"{error} What {step} steps have made is saved as {checkpoint}: go on with --resume_from_checkpoint latest."
    ) from error


def _stop_diverged(run: TrainingRun, step: int, figures: StepFigures) -> None:
    run.save(step)
    raise TrainingDiverged(
        f"The loss became {figures.loss:g} at step {step} (gradient norm {figures.norm:g}). Training stopped; "
        f"the state before that step is in {run.save_last_good()}. Look for broken images, or start "
        f"again with a lower --learning_rate than {run.args.learning_rate:g}."
    )


def _to_device(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    # Convolutions and channel-wise norms are faster with the channels last, on CPU and GPU. PyTorch refuses that
    # layout for the five dimensions of Conv3d, and neither it nor DeepSpeed cuts up parameters that have it.
    tensors = (*model.parameters(), *model.buffers())
    if is_sharding(accelerator) or is_zero(accelerator):
        for tensor in tensors:
            tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
        return model.to(accelerator.device)
    if any(tensor.ndim == 5 for tensor in tensors):
        return model.to(accelerator.device)
    return model.to(accelerator.device, memory_format=torch.channels_last)


def _backward(
    engine: Engine,
    batches: Iterator[Batch],
    loss_of: TrainingLoss,
    args: TrainArguments,
    accelerator: Accelerator,
    signals: StopSignals,
) -> StepFigures:
    """Runs the batches of one step forward and backward, and returns the figures of all processes.

    The gradients are clipped now or in the step to come.
    """
    count = args.gradient_accumulation_steps
    totals = torch.zeros(2, device=accelerator.device)
    skipped: list[str] = []
    for number, batch in enumerate(islice(batches, count), start=1):
        with engine.batch(is_last=number == count):
            reconstruction = reconstruct(engine.network, batch["pixel_values"])
            loss = loss_of(reconstruction, batch["labels"])
            engine.backward(loss)
        error = (reconstruction.detach().float().clamp(0, 1) - batch["labels"]).square().mean(dim=(1, 2, 3))
        skipped += batch["skipped"]
        totals += torch.stack([loss.detach().float(), -10 * error.clamp_min(1e-10).log10().mean()]) / count
    norm = engine.clip().float()
    # The mean over the processes: a loss that is NaN on one of them (its gradient need not be) stops them all, and so
    # does a signal.
    flags = torch.tensor([float(len(skipped)), *signals.flags()], device=accelerator.device)
    local = torch.cat([totals, norm[None], flags])
    loss, psnr, mean_norm, any_skipped, *flags = accelerator.reduce(local, reduction="mean").tolist()
    if any_skipped:
        skipped = Processes(accelerator).lists_of_all(skipped)
    # Under fp16 an infinite norm is the scaler's business: it skips the step and lowers its scale.
    finite = math.isfinite(loss) and (accelerator.scaler is not None or math.isfinite(mean_norm))
    stop_signal = next((signum for signum, flag in zip(STOP_SIGNALS, flags, strict=True) if flag), None)
    return StepFigures(loss, psnr, mean_norm, finite, stop_signal, skipped, batch["position"])


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
    dataset: Dataset, args: TrainArguments, accelerator: Accelerator, first_step: int, position: Position | None
) -> Iterator[Batch]:
    """The batches of this process as `collate` makes them, `gradient_accumulation_steps` of them a step. Those of all
    processes together hold the consecutive sample numbers of the step; a stream goes on at `position`."""
    per_step = args.gradient_accumulation_steps
    steps = StepSampler(
        first_step * per_step,
        args.max_train_steps * per_step,
        args.per_device_train_batch_size,
        accelerator.process_index,
        accelerator.num_processes,
    )
    loader = DataLoader(
        dataset,
        batch_sampler=dataset.sampler(steps, position) if hasattr(dataset, "sampler") else steps,
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
        collate_fn=collate,
        worker_init_fn=_prepare_worker,
        generator=torch.Generator(),  # it draws a seed for its workers, which must not come from that of the step
    )
    for batch in _naming_failures(loader):
        yield {
            key: value.to(accelerator.device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }


def _naming_failures(loader: DataLoader) -> Iterator[Batch]:
    batches = iter(loader)
    try:
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (ValueError, OSError, RuntimeError) as error:
                # Of an error in a worker, PyTorch makes its whole traceback the message.
                reason = str(error).strip().rsplit("\n", 1)[-1].rstrip(".")
                raise DataFailed(f"The next images could not be had: {reason}.") from error
            yield batch
    finally:
        # The workers end when nothing refers to the iterator any more, and an error from it does. They ignore the
        # signal by which Python would stop them at its own end, and it would wait for ever.
        getattr(batches, "_shutdown_workers", lambda: None)()


def _prepare_worker(_worker: int) -> None:
    # Workers share the cores; OpenCV would start a thread for each in every one of them.
    cv2.setNumThreads(1)
    ignore_stop_signals()
