"""Experiment trackers, `--report_to`: TensorBoard, Weights & Biases or Trackio, through Accelerate."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from PIL import Image

from .train_arguments import TrainArguments

_PROJECT = "colora-peft"


def create_accelerator(args: TrainArguments) -> Accelerator:
    """The accelerator of a run that reports to `--report_to`; precision and processes are the launcher's.

    Raises:
        ValueError: if the tracker's package is not installed. Accelerate would leave the tracker out without a word.
    """
    if args.report_to == "none":
        return Accelerator()
    if importlib.util.find_spec(args.report_to) is None:
        raise ValueError(
            f"--report_to {args.report_to} needs the package {args.report_to}, which is not installed: "
            f"pip install {args.report_to}, or leave the flag out."
        )
    folders = ProjectConfiguration(project_dir=args.output_dir, logging_dir=str(Path(args.output_dir) / "logs"))
    return Accelerator(log_with=args.report_to, project_config=folders)


@contextmanager
def running_trackers(accelerator: Accelerator, args: TrainArguments) -> Iterator[None]:
    """The accelerator's trackers, started with the settings of the run and finished whatever happens."""
    if not accelerator.log_with:
        yield
        return
    # TensorBoard takes no None.
    settings = {key: value if isinstance(value, (int, float)) else str(value) for key, value in asdict(args).items()}
    name = {"name": Path(args.output_dir).name}
    accelerator.init_trackers(_PROJECT, settings, {"wandb": {**name, "dir": args.output_dir}, "trackio": name})
    try:
        yield
    finally:
        # Not `end_training`, which takes the process group along: the script goes on.
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers.clear()


def log_picture(accelerator: Accelerator, name: str, file: Path, step: int) -> None:
    """Send a picture file to every tracker. Call it on the main process."""
    for tracker in accelerator.trackers:
        if tracker.name == "trackio":  # has no `log_images` in Accelerate
            import trackio

            tracker.log({name: trackio.Image(str(file))}, step=step)
        elif hasattr(tracker, "log_images"):
            with Image.open(file) as picture:
                pixels = np.asarray(picture.convert("RGB"))  # (H, W, 3), 8 bits
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: pixels[None]}, step=step, **layout)
