"""The output folder of a training run: made, refused, or gone on with."""

from __future__ import annotations

import errno
import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from filelock import FileLock, Timeout

from colora_peft.utils import PARTIAL, Processes, check_writable, write_json

from .arguments import OnResume, TrainArguments, flags_with
from .best import BEST_FOLDER, read_best
from .checkpoint import list_checkpoints, read_state

_RUN_FILE = "run.json"
_LOCK_FILE = ".run.lock"
_LOCK_SECONDS = 10.0  # the workers of a run that was killed hold its lock a little longer
# Files that a run has written before there is a checkpoint or a result.
_NOTES = frozenset({_RUN_FILE, "train_log.jsonl", "validation_log.jsonl", "skipped_pictures.jsonl", "samples"}) | {
    "contributions.json", "contribution.png", "logs", "trackers.json", _LOCK_FILE
}  # fmt: skip
# Defaults of flags at the time when they did not exist.
_DEFAULTS_BEFORE = {"checkerboard_weight": 0.0}
# Errors of file systems that have no locks.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


def check_output_dir(args: TrainArguments, accelerator: Accelerator | None = None) -> Path | None:
    """Refuses an output folder that the run may not write into; returns the checkpoint to resume from, if any.

    `--resume_from_checkpoint latest` begins a run that has not begun, so that one command starts it and restarts it.

    Args:
        args: The run's settings.
        accelerator: That of the run, of which every process calls; the one that writes tries whether it can.

    Raises:
        ValueError: if nothing can be written there, if the folder already holds a run and neither resuming nor
            overwriting was asked for, if it holds other files or what the run reads, if there is nothing to resume
            from, or if the run to resume had other settings.
    """
    output_dir = Path(args.output_dir)
    if accelerator is not None:
        with Processes(accelerator).failing_together():
            if accelerator.is_main_process:
                check_writable(output_dir)
    checkpoint = None if args.resume_from_checkpoint is None else _find_checkpoint(args, output_dir)
    if checkpoint is None:
        _check_free(args, output_dir)
    else:
        _check_same_settings(args, checkpoint)
    return checkpoint


@contextmanager
def open_output_dir(args: TrainArguments, accelerator: Accelerator, checkpoint: Path | None) -> Iterator[None]:
    """Context manager that keeps the output folder for this run and deletes an earlier one, unless it goes on.

    Enter it right before training: until all else is known to work, an earlier run is worth keeping. Leave it when the
    result is written.

    Args:
        args: The run's settings.
        accelerator: That of the run; every process enters.
        checkpoint: Result of `check_output_dir` before.

    Raises:
        ValueError: as `check_output_dir`, or if another run is writing into the folder or did so a moment ago; every
            process stops.
    """
    processes, lock, found = Processes(accelerator), None, checkpoint
    accelerator.wait_for_everyone()  # every process has looked at the folder
    with processes.failing_together():
        if accelerator.is_main_process:
            check_output_dir(args)
            lock = _lock(Path(args.output_dir))
    try:
        with processes.failing_together():
            if accelerator.is_main_process:
                found = check_output_dir(args)
        found = processes.from_main(found)
        with processes.failing_together():
            if found != checkpoint:
                raise ValueError(
                    f"Another run has just written into --output_dir {args.output_dir}: call this one again."
                )
            if accelerator.is_main_process and found is None:
                _begin(args)
        yield
    finally:
        if lock is not None:
            lock.release()


def _begin(args: TrainArguments) -> None:
    output_dir = Path(args.output_dir)
    if args.resume_from_checkpoint is not None:
        print(f"There is no checkpoint in {output_dir} yet: the run begins.")
    _empty(output_dir)
    write_json(output_dir / _RUN_FILE, asdict(args))


def _lock(output_dir: Path) -> FileLock:
    """Keeps other runs out of the folder: two would delete each other's files and mix their logs."""
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output_dir / _LOCK_FILE, timeout=_LOCK_SECONDS, mode=0o666)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"Another run is writing into --output_dir {output_dir}, perhaps one whose launcher was stopped: stop it, "
            "wait for it, or choose another folder."
        ) from error
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        warnings.warn(f"{output_dir} cannot be locked on this file system: start no other run into it.", stacklevel=4)
    return lock


def _empty(output_dir: Path) -> None:
    """Deletes what is in the folder, which may be a link or a volume of its own."""
    for path in output_dir.iterdir():
        if path.name == _LOCK_FILE:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _check_free(args: TrainArguments, output_dir: Path) -> None:
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output_dir {output_dir} is a file; choose a folder.")
    if not output_dir.is_dir() or all(_is_worthless(path) for path in output_dir.iterdir()):
        return
    if not (output_dir / _RUN_FILE).is_file():
        raise ValueError(f"--output_dir {output_dir} holds files that are not of a run; choose another folder.")
    if not args.overwrite_output_dir and (list_checkpoints(output_dir) or not _has_only_notes(output_dir)):
        raise ValueError(
            f"--output_dir {output_dir} already holds a run; add --overwrite_output_dir to delete it or "
            "--resume_from_checkpoint latest to go on with it."
        )
    for name in flags_with(OnResume.INPUT, args):
        value = getattr(args, name)
        if value is None or not Path(value).exists():  # an id on the Hub
            continue
        if Path(value).resolve().is_relative_to(output_dir.resolve()):
            raise ValueError(
                f"--{name} {value} lies in --output_dir {output_dir}, which is emptied first; choose another folder."
            )


def _is_worthless(path: Path) -> bool:
    return path.name.endswith(PARTIAL) or path.name == _LOCK_FILE


def _has_only_notes(output_dir: Path) -> bool:
    """Whether a run ended there before its first checkpoint: nothing is lost with it."""
    notes = _NOTES | {BEST_FOLDER} if _is_best_early(output_dir) else _NOTES
    return all(path.name in notes or path.name.endswith(PARTIAL) for path in output_dir.iterdir())


def _is_best_early(output_dir: Path) -> bool:
    """Whether the best step of a run came before its first checkpoint, so that a run that begins again has it soon."""
    try:
        best, settings = read_best(output_dir), json.loads((output_dir / _RUN_FILE).read_text(encoding="utf-8"))
        return best is not None and best["step"] < settings["checkpointing_steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _find_checkpoint(args: TrainArguments, output_dir: Path) -> Path | None:
    """The checkpoint that the flags name; None if the latest is asked for and the run has none yet."""
    if args.overwrite_output_dir:
        raise ValueError("--overwrite_output_dir and --resume_from_checkpoint exclude each other; give one.")
    if args.resume_from_checkpoint == "latest":
        checkpoints = list_checkpoints(output_dir)
        if not checkpoints and output_dir.is_dir() and not _has_only_notes(output_dir):
            raise ValueError(
                f"--resume_from_checkpoint latest: {output_dir} holds files but no checkpoint. Leave the flag out and "
                "choose another folder, or add --overwrite_output_dir to delete them."
            )
        return checkpoints[-1] if checkpoints else None
    path = Path(args.resume_from_checkpoint)
    if not path.exists():
        path = output_dir / path  # the bare name, as the scripts of diffusers take it
    if path.resolve().parent != output_dir.resolve():
        raise ValueError(
            f"--resume_from_checkpoint {path} is not in --output_dir {output_dir}: a run goes on in its own folder, "
            f"add --output_dir {path.parent}."
        )
    return path


def _check_same_settings(args: TrainArguments, checkpoint: Path) -> None:
    state = read_state(checkpoint)
    saved = state.get("arguments")
    if not isinstance(saved, dict):
        raise ValueError(f"{checkpoint} is no checkpoint of a training run; resume from another one.")
    # A flag that is newer than the checkpoint cannot have been set: the run had its default, of now or of then.
    before = {setting.name: setting.default for setting in fields(args)} | _DEFAULTS_BEFORE | saved
    free = flags_with(OnResume.FREE, args)
    if args.allow_changed_dataset or _knows_its_data(state):
        free += flags_with(OnResume.DATA, args)
    if _may_change_length(args, before, state["step"]):
        free += flags_with(OnResume.LENGTH, args)
    changed = [
        f"--{key} was {before[key]!r}, now {now!r}"
        for key, now in asdict(args).items()
        if key not in free and before[key] != now
    ]
    if changed:
        raise ValueError(f"{checkpoint} is from a run with other settings ({'; '.join(changed)}); use the same ones.")


def _may_change_length(args: TrainArguments, before: dict[str, Any], step: int) -> bool:
    """Returns whether the run is made longer, or another length would have had the same learning rates so far."""
    if args.max_train_steps > before["max_train_steps"]:
        return True
    if args.lr_scheduler != "warmup_stable_decay":
        return False
    return step <= min(before["max_train_steps"] - before["lr_decay_steps"], args.first_decay_step)


def _knows_its_data(state: dict[str, Any]) -> bool:
    """Whether the images themselves are compared when training begins, which cannot be done for a stream."""
    return state.get("dataset") is not None and not state.get("positions")
