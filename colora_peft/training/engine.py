"""Engine that steps a network over all processes of a run by Accelerate; engine_deepspeed.py has that of DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from colora_peft.utils import whole

from .arguments import TrainArguments

# Adam's state by parameter, as an optimiser of PyTorch has it.
OptimizerState = dict[nn.Parameter, dict[str, Tensor]]


class Engine:
    """A network and the AdamW of its trained parameters: one process, several by DDP, or sharded by FSDP 2.

    Args:
        model: The network, on its device.
        optimizer: AdamW of the parameters that require gradients.
        args: The run's settings.
        accelerator: That of the run.

    Attributes:
        network: Module to call in place of the model: it may be wrapped for several processes, autocast or
            torch.compile.
    """

    network: nn.Module

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, args: TrainArguments, accelerator: Accelerator
    ) -> None:
        self.network, self._optimizer = accelerator.prepare(model, optimizer)
        self._accelerator, self._max_grad_norm = accelerator, args.max_grad_norm
        accelerator.gradient_accumulation_steps = args.gradient_accumulation_steps
        # Only now: where the network was sharded, in place, its parameters are others than before.
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    @property
    def state(self) -> OptimizerState:
        """Adam's state by parameter: sharded as the parameters are, else whole. Every process must ask for it."""
        return self._optimizer.optimizer.state

    @state.setter
    def state(self, state: OptimizerState) -> None:
        self._optimizer.optimizer.state = state

    def set_learning_rate(self, rate: float) -> None:
        """Sets the rate of the step to come."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    @contextmanager
    def batch(self, is_last: bool) -> Iterator[None]:
        """Context manager for the forward and backward pass of each batch of a step."""
        self._accelerator.sync_gradients = is_last
        # The gradients of the processes meet once, in the last batch.
        with nullcontext() if is_last else self._accelerator.no_sync(self.network):
            yield

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of the loss divided by the number of batches of a step: the mean over them."""
        self._accelerator.backward(loss)

    def clip(self) -> Tensor:
        """Clips the gradients, at the latest in the step to come; returns their norm before, over all processes."""
        return whole(self._accelerator.clip_grad_norm_(self._parameters, self._max_grad_norm).detach())

    def step(self) -> None:
        """Steps and forgets the gradients."""
        self._optimizer.step()
        self._optimizer.zero_grad()

    def release(self) -> None:
        """Unwraps the model."""
        self._accelerator.unwrap_model(self.network, keep_fp32_wrapper=False)
