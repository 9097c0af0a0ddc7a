"""Devices and processes: sharing work out among those of an `accelerate launch`, or doing it all in one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from torch import Tensor


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


@dataclass(frozen=True)
class Processes:
    """The processes of an accelerator, or this one alone for None. With one process, nothing is sent or copied."""

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

    def lists_of_all(self, own: list[Any]) -> list[Any]:
        """Every process's list, one after another."""
        return own if self.count == 1 else gather_object(own)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Makes all processes leave the block by an error if one of them does, which the others would wait for.

        Nothing may be exchanged inside.

        Raises:
            ValueError: another process failed (named), while this one did not.
        """
        if self.count == 1:
            yield
            return
        own_error = None
        try:
            yield
        except Exception as error:
            own_error = error
        failed = [str(index) for index, flag in enumerate(self.all_of(int(own_error is not None))) if flag]
        if own_error is not None:
            raise own_error
        if failed:
            which = f"Process {failed[0]}" if len(failed) == 1 else f"The processes {', '.join(failed)}"
            raise ValueError(f"{which} of {self.count} failed, so this one stops, too: correct the error named there.")

    def from_main(self, value: Any) -> Any:
        """The main process's object, on every process."""
        return value if self.count == 1 else broadcast_object_list([value])[0]

    def tensor_from_main(self, value: Tensor) -> Tensor:
        """The main process's tensor, on every process; `value` is overwritten."""
        return value if self.count == 1 else broadcast(value)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself or, of a sharded one, all of it. For a sharded one every process must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def fill(target: Tensor, value: Tensor) -> None:
    """Overwrites a tensor, sharded or not, by a whole `value`. For a sharded one every process must call it."""
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(target.device, target.dtype), target.device_mesh, target.placements)
    target.copy_(value)
