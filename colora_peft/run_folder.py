"""The output folder of a training run: made, refused, or gone on with."""

from __future__ import annotations

import shutil
from dataclasses import asdict, fields
from pathlib import Path

from accelerate import Accelerator

from .checkpoint import list_checkpoints, read_state
from .files import PARTIAL, write_json
from .train_arguments import TrainArguments

_RUN_FILE = "run.json"
# What a run has written before there is a checkpoint or a result.
_NOTES = frozenset({_RUN_FILE, "train_log.jsonl", "validation_log.jsonl", "skipped_pictures.jsonl", "samples"}) | {
    "contributions.json", "contribution.png", "logs", "trackers.json"
}  # fmt: skip
# What may change on resume without changing the result. Batch size and accumulation may because processes may: their
# product, the global batch, is checked when training starts.
_FREE = frozenset(
    {"output_dir", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "overwrite_output_dir"}
    | {"dataloader_num_workers", "per_device_train_batch_size", "gradient_accumulation_steps"}
    | {"validation_steps", "report_to", "push_to_hub", "hub_model_id", "hub_private_repo"}
    | {"allow_changed_dataset", "max_skipped_share", "check_pictures"}
)
_DATA = frozenset({"train_dir", "dataset_name", "dataset_config_name", "image_column"})


def check_output_dir(args: TrainArguments) -> Path | None:
    """Whether the run may write into its output folder; the checkpoint to resume from, if any. Writes nothing.

    Raises:
        ValueError: if the folder already holds a run and neither resuming nor overwriting was asked for, if it holds
            other files, if there is nothing to resume from, or if the run to resume had other settings.
    """
    output_dir = Path(args.output_dir)
    if args.resume_from_checkpoint is None:
        _check_free(args, output_dir)
        return None
    checkpoint = _find_checkpoint(args, output_dir)
    _check_same_settings(args, checkpoint)
    return checkpoint


def create_output_dir(args: TrainArguments, accelerator: Accelerator) -> None:
    """Make the output folder, deleting an earlier run in it; leave it as it is where a run goes on.

    Call it once all else is known to work, right before training: until then an earlier run is worth keeping.

    Raises:
        ValueError: as `check_output_dir`; every process checks, so that all of them stop where one must.
    """
    check_output_dir(args)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and args.resume_from_checkpoint is None:
        output_dir = Path(args.output_dir)
        if output_dir.is_dir() and any(output_dir.iterdir()):
            shutil.rmtree(output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / _RUN_FILE, asdict(args))
    accelerator.wait_for_everyone()


def _check_free(args: TrainArguments, output_dir: Path) -> None:
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output_dir {output_dir} is a file; choose a folder.")
    if not output_dir.is_dir() or all(path.name.endswith(PARTIAL) for path in output_dir.iterdir()):
        return
    if not (output_dir / _RUN_FILE).is_file():
        raise ValueError(f"--output_dir {output_dir} holds files that are not of a run; choose another folder.")
    if not args.overwrite_output_dir and (list_checkpoints(output_dir) or not _has_only_notes(output_dir)):
        raise ValueError(
            f"--output_dir {output_dir} already holds a run; add --overwrite_output_dir to delete it or "
            "--resume_from_checkpoint latest to go on with it."
        )


def _has_only_notes(output_dir: Path) -> bool:
    """Whether a run ended there before its first checkpoint, so that nothing is lost with it."""
    return all(path.name in _NOTES or path.name.endswith(PARTIAL) for path in output_dir.iterdir())


def _find_checkpoint(args: TrainArguments, output_dir: Path) -> Path:
    if args.overwrite_output_dir:
        raise ValueError("--overwrite_output_dir and --resume_from_checkpoint exclude each other; give one.")
    if args.resume_from_checkpoint == "latest":
        checkpoints = list_checkpoints(output_dir)
        if not checkpoints:
            raise ValueError(
                f"--resume_from_checkpoint latest: there is no checkpoint in {output_dir}; leave it out to start anew."
            )
        return checkpoints[-1]
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
    saved = read_state(checkpoint).get("arguments")
    if not isinstance(saved, dict):
        raise ValueError(f"{checkpoint} is no checkpoint of a training run; resume from another one.")
    # A flag that is newer than the checkpoint cannot have been set: the run had its default.
    before = {setting.name: saved.get(setting.name, setting.default) for setting in fields(args)}
    free = _FREE | _DATA if args.allow_changed_dataset else _FREE
    changed = [
        f"--{key} was {before[key]!r}, now {now!r}"
        for key, now in asdict(args).items()
        if key not in free and before[key] != now
    ]
    if changed:
        raise ValueError(f"{checkpoint} is from a run with other settings ({'; '.join(changed)}); use the same ones.")
