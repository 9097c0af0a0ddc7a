"""What steps a network over all processes of a run: `Engine`, by Accelerate. DeepSpeed's is in `colora_peft.zero`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .sharding import whole
from .train_arguments import TrainArguments

# Adam's state by parameter, as an optimizer of PyTorch has it.
OptimizerState = dict[nn.Parameter, dict[str, Tensor]]


class Engine:
    """A network and the optimizer of its trained parameters, under Accelerate.

    Attributes:
        network: What is called in place of `model`: around it may be several processes, autocast or torch.compile.

    Args:
        model: The network, on its device.
        optimizer: Of the parameters that require gradients.
        args: The run's settings.
        accelerator: The run's.
    """

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
        """Adam's state: sharded as the parameters are, else whole. Every process must ask for it."""
        return self._optimizer.optimizer.state

    @state.setter
    def state(self, state: OptimizerState) -> None:
        self._optimizer.optimizer.state = state

    def set_learning_rate(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    def batch(self, is_last: bool) -> AbstractContextManager[Any]:
        """Around the forward and backward pass of each batch of a step."""
        self._accelerator.sync_gradients = is_last
        # The gradients of the processes meet once, in the last batch.
        return nullcontext() if is_last else self._accelerator.no_sync(self.network)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of the loss divided by the number of batches of a step: the mean over them."""
        self._accelerator.backward(loss)

    def clip(self) -> Tensor:
        """Clip the gradients, at the latest in the step to come; their norm before, over all processes."""
        return whole(self._accelerator.clip_grad_norm_(self._parameters, self._max_grad_norm).detach())

    def step(self) -> None:
        """Step and forget the gradients."""
        self._optimizer.step()
        self._optimizer.zero_grad()

    def release(self) -> None:
        """Take off the model what was put on it."""
        self._accelerator.unwrap_model(self.network, keep_fp32_wrapper=False)
