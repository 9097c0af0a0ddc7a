"""Experiment trackers, `--report_to`: TensorBoard, Weights & Biases or Trackio, through Accelerate."""

from __future__ import annotations

import importlib.util
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from PIL import Image

from colora_peft.utils import write_json

from .arguments import TrainArguments
from .engine_deepspeed import check_zero
from .fsdp import check_distributed_type

_PROJECT = "colora-peft"
_STATE_FILE = "trackers.json"


def create_accelerator(args: TrainArguments) -> Accelerator:
    """The accelerator of a run that reports to `--report_to`; precision and processes are the launcher's.

    Launches that training does not support are refused, before anything is loaded or deleted.

    Raises:
        ValueError: if the tracker's package is not installed (Accelerate would leave the tracker out without a word),
            or if networks cannot be trained under such a launch.
    """
    settings: dict[str, Any] = {}
    if args.report_to != "none":
        if importlib.util.find_spec(args.report_to) is None:
            raise ValueError(
                f"--report_to {args.report_to} needs the package {args.report_to}, which is not installed: "
                f"pip install {args.report_to}, or leave the flag out."
            )
        folders = ProjectConfiguration(project_dir=args.output_dir, logging_dir=str(Path(args.output_dir) / "logs"))
        settings = {"log_with": args.report_to, "project_config": folders}
    accelerator = Accelerator(**settings)
    check_distributed_type(accelerator)
    check_zero(accelerator)
    return accelerator


@contextmanager
def running_trackers(accelerator: Accelerator, args: TrainArguments) -> Iterator[None]:
    """The accelerator's trackers, finished whatever happens; those of a resumed run go on with its run there.

    `trackers.json` in the output folder holds the run's name there and the last step that was sent of each kind.
    """
    if not accelerator.log_with:
        yield
        return
    state = _read_state(accelerator)
    begins = not state.get("run")
    if begins:  # names identify runs there, and output folders may have equal ones
        state = {"run": f"{Path(args.output_dir).name}-{uuid.uuid4().hex[:8]}", "sent": {}}
        if accelerator.is_main_process:
            _write_state(accelerator, state)
    # TensorBoard takes no None.
    settings = {key: value if isinstance(value, (int, float)) else str(value) for key, value in asdict(args).items()}
    name = {"name": state["run"], "resume": "never" if begins else "allow"}
    accelerator.init_trackers(
        _PROJECT,
        settings if begins else None,  # TensorBoard would show them as another run each time
        {"wandb": {**name, "id": state["run"], "dir": args.output_dir}, "trackio": name},
    )
    try:
        yield
    finally:
        # Not `end_training`, which takes the process group along: the script goes on.
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers.clear()


def log_figures(accelerator: Accelerator, kind: str, figures: dict[str, float], step: int) -> None:
    """Sends figures to every tracker, once: a resumed run repeats steps after its checkpoint. Call it on the main
    process, with the steps of a `kind` in order."""
    if _is_new(accelerator, kind, step):
        accelerator.log(figures, step=step)


def log_image(accelerator: Accelerator, name: str, file: Path, step: int) -> None:
    """Sends an image file to every tracker, as `log_figures` does its figures."""
    if not _is_new(accelerator, name, step):
        return
    for tracker in accelerator.trackers:
        if tracker.name == "trackio":  # has no `log_images` in Accelerate
            import trackio

            tracker.log({name: trackio.Image(str(file))}, step=step)
        elif hasattr(tracker, "log_images"):
            with Image.open(file) as image:
                pixels = np.asarray(image.convert("RGB"))  # (H, W, 3), 8 bits
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: pixels[None]}, step=step, **layout)
            if tracker.name == "tensorboard":  # a killed run would lose it, and not send it again
                tracker.writer.flush()


def _is_new(accelerator: Accelerator, kind: str, step: int) -> bool:
    """Whether this step is new to the trackers; it is noted as sent."""
    if not accelerator.trackers:
        return False
    state = _read_state(accelerator)
    if not state:
        return True
    if step <= state["sent"].get(kind, 0):
        return False
    state["sent"][kind] = step
    _write_state(accelerator, state)
    return True


def _read_state(accelerator: Accelerator) -> dict[str, Any]:
    """The notes on this kind of tracker; empty where there are none."""
    return _read_states(accelerator).get(_kind(accelerator), {})


def _write_state(accelerator: Accelerator, state: dict[str, Any]) -> None:
    if accelerator.project_dir is not None:  # other accelerators have no folder for notes
        file = Path(accelerator.project_dir) / _STATE_FILE
        write_json(file, {**_read_states(accelerator), _kind(accelerator): state})


def _read_states(accelerator: Accelerator) -> dict[str, Any]:
    file = Path(accelerator.project_dir or "") / _STATE_FILE
    is_known = accelerator.project_dir is not None and file.is_file()
    return json.loads(file.read_text(encoding="utf-8")) if is_known else {}


def _kind(accelerator: Accelerator) -> str:
    return str(getattr(accelerator.log_with[0], "value", accelerator.log_with[0]))
