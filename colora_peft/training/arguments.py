"""The settings of a training run, as every training script takes them on its command line."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, ClassVar, Literal, get_type_hints

from colora_peft.utils import check_at_least, check_seed, flag


class OnResume(Enum):
    """Rules of a flag for a run that goes on, and for its folder; without one it must keep its value.

    A flag has them in its type: `Annotated[int, OnResume.FREE]`.
    """

    FREE = "may change, because the weights do not depend on it"
    DATA = "may change where the images themselves are compared, or --allow_changed_dataset is given"
    LENGTH = "may grow, and may change while the learning rate of warmup_stable_decay has not begun to fall"
    INPUT = "is read by the run, so that it must not lie in the folder that the run empties"


def flags_with(rule: OnResume, args: object) -> list[str]:
    """The names of the flags with that rule; subclasses that declare a flag again keep the rules of their bases."""
    hints = [get_type_hints(kind, include_extras=True) for kind in type(args).__mro__[:-1]]
    names = [name for of_a_class in hints for name, hint in of_a_class.items()
             if rule in getattr(hint, "__metadata__", ())]  # fmt: skip
    return list(dict.fromkeys(names))


@dataclass
class TrainArguments:
    """Flags that every training script has. Names follow the scripts of diffusers."""

    way_to_go_on: ClassVar[str] = "the same command and --resume_from_checkpoint latest"
    """Words for what continues a stopped run."""

    output_dir: Annotated[str, OnResume.FREE] = flag(help="Path to the folder for checkpoints, logs and the result.")
    max_train_steps: Annotated[int, OnResume.LENGTH] = flag(
        help="Number of optimiser steps of the whole run; more of them prolong it on resume."
    )
    # Batch size and accumulation may change because processes may. Training checks their product when it starts.
    per_device_train_batch_size: Annotated[int, OnResume.FREE] = flag(
        help="Number of patches in a batch of each process."
    )
    resolution: int = flag(help="Side of the square training patches in pixels.")
    learning_rate: float = flag(help="Peak learning rate of AdamW; it falls to zero along a cosine.")
    lr_warmup_steps: int = flag(0, "Number of steps over which the learning rate rises from zero.")
    lr_scheduler: Literal["cosine", "warmup_stable_decay"] = flag(
        "cosine",
        "cosine: the learning rate falls from the warm-up to the end; warmup_stable_decay: it stays at its peak until "
        "the last --lr_decay_steps, and until then a run that is prolonged on resume is as one that was as long from "
        "the beginning.",
    )
    lr_decay_steps: Annotated[int, OnResume.LENGTH] = flag(
        0, "Number of last steps in which warmup_stable_decay lowers the learning rate."
    )
    gradient_accumulation_steps: Annotated[int, OnResume.FREE] = flag(
        1,
        "Number of batches whose gradients each process adds up for a step: like a batch this many times larger, in "
        "the memory of one.",
    )
    use_ema: bool = flag(False, "The result is the exponential moving average of the trained weights.")
    ema_decay: float = flag(0.9999, "Weight of the past in that average at each step; it rises to this value.")
    checkerboard_weight: float = flag(
        0.0,
        "Weight of a loss on the grid that networks with PixelShuffle leave on smooth areas, beside the mean absolute "
        "error. Its period is what the network names as pads_to_multiple or needs_multiple_of; it is zero without "
        "that, and where a side of the patches has fewer than four periods.",
    )
    max_grad_norm: float = flag(1.0, "Norm to which gradients are clipped.")
    seed: int = flag(0, "Seed of everything random; on one CPU set-up it fixes the result bitwise.")
    checkpointing_steps: Annotated[int, OnResume.FREE] = flag(500, "Number of steps between checkpoints.")
    checkpoints_total_limit: Annotated[int, OnResume.FREE] = flag(
        2, "Number of checkpoints to keep; older ones go. 0 keeps all of them."
    )
    validation_steps: Annotated[int, OnResume.FREE] = flag(
        0, "Number of steps between evaluations during training, with sample images in --output_dir. 0: none."
    )
    save_best: Annotated[bool, OnResume.FREE] = flag(
        False, "Keep the result of the step with the best PSNR of --validation_steps in the folder best, too."
    )
    report_to: Annotated[Literal["tensorboard", "wandb", "trackio", "none"], OnResume.FREE] = flag(
        "none", "Tracker that gets figures and sample images, besides train_log.jsonl in --output_dir."
    )
    resume_from_checkpoint: Annotated[str | None, OnResume.FREE] = flag(
        None, "'latest' or the name of a checkpoint in --output_dir: go on from there."
    )
    allow_changed_dataset: Annotated[bool, OnResume.FREE] = flag(
        False, "Resume although files of the dataset were added, removed or changed."
    )
    overwrite_output_dir: Annotated[bool, OnResume.FREE] = flag(False, "Delete an earlier run in --output_dir.")
    dataloader_num_workers: Annotated[int, OnResume.FREE] = flag(
        0, "Number of processes that prepare patches; 0 prepares them in the training process."
    )
    push_to_hub: Annotated[bool, OnResume.FREE] = flag(
        False, "Push the result to the Hub at the end, as who `hf auth login` has logged in."
    )
    hub_model_id: Annotated[str | None, OnResume.FREE] = flag(
        None, "Repository to push to. Default: the name of --output_dir, under your name."
    )
    hub_private_repo: Annotated[bool, OnResume.FREE] = flag(
        False, "Make that repository private; one that is there and public is refused."
    )

    def __post_init__(self) -> None:
        for name in ("max_train_steps", "per_device_train_batch_size", "resolution", "checkpointing_steps"):
            check_at_least(self, name, 1)
        check_at_least(self, "gradient_accumulation_steps", 1)
        for name in (
            "lr_warmup_steps",
            "lr_decay_steps",
            "dataloader_num_workers",
            "checkpoints_total_limit",
            "validation_steps",
        ):
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
        if self.save_best and not self.validation_steps:
            raise ValueError("--save_best has no effect without --validation_steps: add it.")
        if (self.hub_model_id is not None or self.hub_private_repo) and not self.push_to_hub:
            raise ValueError("--hub_model_id and --hub_private_repo have no effect without --push_to_hub: add it.")
        if not (self.checkerboard_weight >= 0 and math.isfinite(self.checkerboard_weight)):
            raise ValueError(f"--checkerboard_weight must be a number of at least 0, got {self.checkerboard_weight}.")
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
