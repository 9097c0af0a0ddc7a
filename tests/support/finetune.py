"""examples/finetune.py, run in this process with small settings."""

import json
from pathlib import Path

from transformers import HfArgumentParser

from .examples import load_example

finetune = load_example("finetune")

QUICK = ["--max_train_steps", "4", "--per_device_train_batch_size", "2", "--resolution", "32"]
QUICK += ["--probe_steps", "2", "--probe_batches", "1", "--checkpointing_steps", "2"]


def run(*flags: object) -> Path:
    """Runs the script in this process and returns its output folder."""
    (args,) = HfArgumentParser(finetune.FinetuneArguments).parse_args_into_dataclasses([str(flag) for flag in flags])
    finetune.main(args)
    return Path(args.output_dir)


def metrics_of(output_dir: Path) -> dict:
    return json.loads((output_dir / "metrics.json").read_text())
