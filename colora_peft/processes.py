"""Sharing work out among the processes of an `accelerate launch`, or doing it all in one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor

__all__ = ["Processes"]


@dataclass(frozen=True)
class Processes:
    """The processes of an accelerator; None is this one alone. Where there is one, nothing is sent or copied."""

    accelerator: Accelerator | None

    @property
    def count(self) -> int:
        return 1 if self.accelerator is None else self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.accelerator is None or self.accelerator.is_main_process

    def is_mine(self, index: int) -> bool:
        """Whether piece `index` of the work falls to this process: they take turns."""
        return self.accelerator is None or index % self.count == self.accelerator.process_index

    def sum(self, value: Tensor) -> Tensor:
        """The sum of every process's `value`, the same on all of them."""
        return value if self.count == 1 else self.accelerator.reduce(value, reduction="sum")

    def sum_of_numbers(self, value: float) -> float:
        if self.count == 1:
            return value
        return self.sum(torch.tensor(value, dtype=torch.float64, device=self.accelerator.device)).item()

    def all_of(self, value: int) -> list[int]:
        """Every process's `value`."""
        if self.count == 1:
            return [value]
        return self.accelerator.gather(torch.tensor([value], device=self.accelerator.device)).tolist()

    def from_main(self, value: Any) -> Any:
        """The main process's object, on every process."""
        return value if self.count == 1 else broadcast_object_list([value])[0]

    def tensor_from_main(self, value: Tensor) -> Tensor:
        """The main process's tensor, on every process; `value` is overwritten."""
        return value if self.count == 1 else broadcast(value)
