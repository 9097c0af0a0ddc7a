"""Networks whose parameters are shared out over the processes (FSDP2): whole tensors to shards and back.

Not yet run on the hardware it is for; the tests shard a network over two processes of a CPU.
"""

from __future__ import annotations

import copy

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn


def is_sharding(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.FSDP


def check_distributed_type(accelerator: Accelerator) -> None:
    """Refuse launches under which a run would be wrong or could not be resumed.

    Raises:
        ValueError: for FSDP version 1 (no whole tensors by name) and Megatron (it steps inside the backward pass,
            before a bad gradient is noticed, and keeps Adam's moments for itself).
    """
    kind = accelerator.distributed_type
    if kind == DistributedType.MEGATRON_LM:
        raise ValueError(
            f"Training under {kind.value} is not supported: launch with DDP, or with FSDP version 2 where the network "
            "does not fit (examples/accelerate_configs)."
        )
    if is_sharding(accelerator) and not accelerator.is_fsdp2:
        raise ValueError("FSDP version 1 is not supported: set `fsdp_version: 2` in the configuration of accelerate.")


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself or, of a sharded one, all of it. For a sharded one every process must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def fill(target: Tensor, value: Tensor) -> None:
    """Overwrite a tensor, sharded or not, by a whole `value`. For a sharded one every process must call it."""
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(target.device, target.dtype), target.device_mesh, target.placements)
    target.copy_(value)


class WholeNetwork:
    """The network that is evaluated, saved and returned: of a sharded one a whole copy, brought up to date by `get`.

    Args:
        model: The network before Accelerate prepares it.
        accelerator: The run's.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator) -> None:
        self._copy = copy.deepcopy(model) if is_sharding(accelerator) else None

    def get(self, model: nn.Module) -> nn.Module:
        """`model` itself where it is not sharded. Every process must call it."""
        if self._copy is None:
            return model
        target = dict(self._copy.state_dict())
        for name, tensor in model.state_dict().items():
            fill(target[name], whole(tensor))
        return self._copy
