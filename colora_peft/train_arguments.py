"""The settings of a training run, as every training script takes them on its command line."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class TrainArguments:
    """Flags that every training script has. Names follow the scripts of diffusers."""

    output_dir: str = field(metadata={"help": "Folder for checkpoints, logs and the result."})
    max_train_steps: int = field(metadata={"help": "Optimiser steps of the whole run."})
    per_device_train_batch_size: int = field(metadata={"help": "Patches a step on each process."})
    resolution: int = field(metadata={"help": "Side of the square training patches in pixels."})
    learning_rate: float = field(metadata={"help": "Peak learning rate of AdamW; it falls to zero."})
    lr_warmup_steps: int = field(default=0, metadata={"help": "Steps over which the learning rate rises from zero."})
    lr_scheduler: Literal["cosine", "warmup_stable_decay"] = field(
        default="cosine",
        metadata={"help": "cosine: the learning rate falls from the warm-up to the end; warmup_stable_decay: it stays "
                  "at its peak until the last --lr_decay_steps, and until then the run may be prolonged on resume."},
    )  # fmt: skip
    lr_decay_steps: int = field(
        default=0, metadata={"help": "Number of last steps in which warmup_stable_decay lowers the learning rate."}
    )
    gradient_accumulation_steps: int = field(
        default=1,
        metadata={"help": "Batches whose gradients each process adds up for a step: like a batch this many times "
                  "larger, in the memory of one."},
    )  # fmt: skip
    use_ema: bool = field(
        default=False, metadata={"help": "The result is the exponential moving average of the trained weights."}
    )
    ema_decay: float = field(
        default=0.9999,
        metadata={"help": "Weight of the past in that average at each step; it rises to this value."},
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    seed: int = field(
        default=0, metadata={"help": "Seed of everything random; on one CPU set-up it fixes the result bitwise."}
    )
    checkpointing_steps: int = field(default=500, metadata={"help": "Steps between checkpoints."})
    checkpoints_total_limit: int = field(
        default=2, metadata={"help": "Checkpoints kept; older ones go. 0 keeps all of them."}
    )
    validation_steps: int = field(
        default=0,
        metadata={"help": "Steps between evaluations during training, with sample pictures in --output_dir. 0: none."},
    )
    report_to: Literal["tensorboard", "wandb", "trackio", "none"] = field(
        default="none",
        metadata={"help": "Send figures and sample pictures there, besides train_log.jsonl in --output_dir."},
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "'latest' or a checkpoint in --output_dir: go on from there."}
    )
    allow_changed_dataset: bool = field(
        default=False, metadata={"help": "Resume although files of the dataset were added, removed or changed."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Delete an earlier run in --output_dir."})
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "Processes that prepare patches; 0 prepares them in the training process."}
    )
    push_to_hub: bool = field(
        default=False,
        metadata={"help": "Push the result to the Hub at the end, as who `hf auth login` has logged in."},
    )
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Repository to push to. Default: the name of --output_dir, under your name."}
    )
    hub_private_repo: bool = field(
        default=False, metadata={"help": "Make that repository private; one that is there and public is refused."}
    )

    def __post_init__(self) -> None:
        for name in ("max_train_steps", "per_device_train_batch_size", "resolution", "checkpointing_steps"):
            check_at_least(self, name, 1)
        check_at_least(self, "gradient_accumulation_steps", 1)
        check_at_least(self, "lr_decay_steps", 0)
        for name in ("lr_warmup_steps", "dataloader_num_workers", "checkpoints_total_limit", "validation_steps"):
            check_at_least(self, name, 0)
        check_seed(self.seed)
        if self.lr_decay_steps and self.lr_scheduler != "warmup_stable_decay":
            raise ValueError("--lr_decay_steps has no effect without --lr_scheduler warmup_stable_decay: add it.")
        if self.lr_decay_steps and self.lr_warmup_steps + self.lr_decay_steps > self.max_train_steps:
            raise ValueError(
                f"--lr_warmup_steps {self.lr_warmup_steps} and --lr_decay_steps {self.lr_decay_steps} are together "
                f"more than the {self.max_train_steps} steps of the run; lower one of them."
            )
        if self.lr_scheduler == "cosine" and self.lr_warmup_steps >= self.max_train_steps:
            warnings.warn(
                f"The learning rate rises over --lr_warmup_steps {self.lr_warmup_steps}, and the run ends after "
                f"{self.max_train_steps} steps: it will not decay. Lower the one or raise the other.",
                stacklevel=2,
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"--ema_decay must be at least 0 and below 1, got {self.ema_decay}.")
        if (self.hub_model_id is not None or self.hub_private_repo) and not self.push_to_hub:
            raise ValueError("--hub_model_id and --hub_private_repo have no effect without --push_to_hub: add it.")
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"--{name} must be a positive number, got {value}.")

    def is_due(self, every_steps: int, done: int) -> bool:
        """Whether what happens every so many steps (0: never) happens after `done` steps, the last of all included."""
        return every_steps > 0 and (done % every_steps == 0 or done == self.max_train_steps)

    @property
    def first_decay_step(self) -> int:
        """Step from which on the learning rate falls along a cosine that reaches zero after the last step."""
        return self.lr_warmup_steps if self.lr_scheduler == "cosine" else self.max_train_steps - self.lr_decay_steps

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, the peak until `first_decay_step`, then half a cosine."""
        if step < self.lr_warmup_steps:
            return self.learning_rate * (step + 1) / self.lr_warmup_steps
        if step < self.first_decay_step:
            return self.learning_rate
        progress = (step - self.first_decay_step) / max(1, self.max_train_steps - self.first_decay_step)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def check_at_least(args: object, name: str, least: int) -> None:
    """Refuse a flag whose value is below `least`."""
    if getattr(args, name) < least:
        raise ValueError(f"--{name} must be at least {least}, got {getattr(args, name)}.")


def check_seed(seed: int) -> None:
    """Refuse a seed that NumPy or torch would refuse."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed must be at least 0 and below 2**32, got {seed}.")
