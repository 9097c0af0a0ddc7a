"""Evaluation while a run trains, `--validation_steps`: figures and sample images, in files and trackers."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from torch import nn

from colora_peft.data import PairSource, PairSubset
from colora_peft.evaluation import evaluate, restore_some, save_before_after
from colora_peft.utils import Processes

from .log import append_row
from .trackers import log_figures, log_image

VALIDATION_LOG = "validation_log.jsonl"
_SAMPLES = "samples"
_IMAGES = 4


def validate(
    model: nn.Module, pairs: PairSource, output_dir: Path, step: int, accelerator: Accelerator
) -> dict[str, float]:
    """Evaluates the network after `step` steps; the processes share the pairs out.

    The main process writes a row of mean PSNR (dB) and SSIM, those of the inputs as `*_input`, to
    `validation_log.jsonl` and images (input | restored | target) to `samples/step-<step>.png`.

    Args:
        model: The network itself, without Accelerate's wrappers.
        pairs: Whole images; every process gets all of them.
        output_dir: The run's folder.
        step: Number of steps that the network was trained.
        accelerator: That of the run; its trackers get figures and images, too.

    Returns:
        The figures over all pairs, the same on every process.
    """
    processes = Processes(accelerator)
    own = PairSubset(pairs, [index for index in range(len(pairs)) if processes.is_mine(index)])
    means = evaluate(model, own, accelerator.device, "") if len(own) else {}
    names = ("psnr", "ssim", "psnr_input", "ssim_input")
    totals = [processes.sum_of_numbers(means.get(name, 0.0) * len(own)) for name in names]
    figures = {name: total / len(pairs) for name, total in zip(names, totals, strict=True)}
    if accelerator.is_main_process:
        append_row(output_dir / VALIDATION_LOG, {"step": step, **figures})
        sent = {f"validation/{name}": value for name, value in figures.items()}
        log_figures(accelerator, "validation", sent, step)
        samples = output_dir / _SAMPLES
        samples.mkdir(exist_ok=True)
        file = samples / f"step-{step}.png"
        save_before_after(restore_some(model, pairs, _IMAGES), file)
        log_image(accelerator, "validation/samples", file, step)
    return figures


def line_of(figures: dict[str, float], step: int) -> str:
    """The figures of `validate` as a line for the terminal."""
    return (
        f"step {step}: PSNR {figures['psnr']:.2f} dB, SSIM {figures['ssim']:.3f} "
        f"(input {figures['psnr_input']:.2f} dB, {figures['ssim_input']:.3f})"
    )
