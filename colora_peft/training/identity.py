"""Properties of a run that the checkpoint from which it goes on must share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset

from colora_peft.utils import Processes

from .arguments import TrainArguments
from .checkpoint import frozen_digest


@dataclass(frozen=True)
class RunIdentity:
    """Properties that a run shares with its checkpoints.

    Attributes:
        mixed_precision: That of the accelerator.
        global_batch_size: Number of patches of an optimiser step, over all processes and accumulated batches.
        frozen: Digest of the weights that are not trained; None if all are.
        method_version: That of the adapter; None without one, or if it has none.
        dataset: Digest of the training samples; None if they have none.
    """

    mixed_precision: str
    global_batch_size: int
    frozen: str | None
    method_version: int | None
    dataset: str | None

    @staticmethod
    def of(model: nn.Module, args: TrainArguments, accelerator: Accelerator, dataset: Dataset) -> RunIdentity:
        """The identity of a run of `model`; all processes call it together."""
        # One process alone looks at all the files.
        digest = getattr(dataset, "digest", None) if accelerator.is_main_process else None
        config = getattr(model, "peft_config", {}).get("default")
        of_a_process = args.per_device_train_batch_size * args.gradient_accumulation_steps
        return RunIdentity(
            mixed_precision=accelerator.mixed_precision,
            global_batch_size=of_a_process * accelerator.num_processes,
            frozen=frozen_digest(model),
            method_version=getattr(config, "method_version", None),
            dataset=Processes(accelerator).from_main(digest),
        )

    def as_state(self) -> dict[str, Any]:
        """The entries of a checkpoint's state."""
        return asdict(self)

    def check(self, checkpoint: Path, saved: dict[str, Any], allow_changed_dataset: bool = False) -> None:
        """Refuses a checkpoint of another run.

        Args:
            checkpoint: Its folder, for the message.
            saved: Its state. Older ones lack some entries.
            allow_changed_dataset: Whether the samples may be others.

        Raises:
            ValueError: It is one.
        """
        precision = saved.get("mixed_precision", self.mixed_precision)
        if precision != self.mixed_precision:
            raise ValueError(
                f"{checkpoint} was trained with --mixed_precision {precision}, this run has {self.mixed_precision}; "
                "launch it with the same."
            )
        batch_size = saved.get("global_batch_size")
        if batch_size != self.global_batch_size:
            raise ValueError(
                f"{checkpoint} was trained with {batch_size} patches a step over all processes, this run has "
                f"{self.global_batch_size}; set --per_device_train_batch_size and --gradient_accumulation_steps so "
                "that they are equal."
            )
        frozen = saved.get("frozen", self.frozen)
        if frozen != self.frozen:
            raise ValueError(
                f"{checkpoint} was trained on a network with other frozen weights ({frozen}) than this one "
                f"({self.frozen}): the network to adapt was replaced. Give the one that the run began with, or start "
                "again."
            )
        # Older checkpoints do not say. Versions 1 and 2 are then that of the run: it has one of 1 from its adapter.
        version = saved.get("method_version", self.method_version and min(self.method_version, 2))
        if version != self.method_version:
            raise ValueError(
                f"{checkpoint} holds an adapter of method_version {version}, this run has one of "
                f"{self.method_version}, which computes something else with the same weights: finish the run with "
                "the release that began it, or start again."
            )
        digest = saved.get("dataset")
        is_known = digest is not None and self.dataset is not None
        if is_known and digest != self.dataset and not allow_changed_dataset:
            raise ValueError(
                f"{checkpoint} was trained on another dataset ({digest}) than this one ({self.dataset}): files were "
                "added, removed or changed. Give the same data, or go on with the new with --allow_changed_dataset."
            )
