"""Networks whose parameters are shared out over the processes (FSDP2): whole tensors to shards and back.

Not yet run on the hardware it is for; the tests shard a network over two processes of a CPU.
"""

from __future__ import annotations

import copy

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from colora_peft.utils import fill, whole


def is_sharding(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.FSDP


def check_distributed_type(accelerator: Accelerator) -> None:
    """Refuses launches under which a run would be wrong or could not be resumed.

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
