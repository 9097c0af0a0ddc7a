"""DeepSpeed's ZeRO, stages 1 and 2: every process has the whole weights and steps a share of them.

Only that share's moments of Adam are on a process, under stage 2 only its gradients, too. The weights stay float32 and
bf16 is autocast, as without DeepSpeed, so that a run is the same and either goes on with a checkpoint of the other.

Not yet run on GPUs; the tests run it over two processes of a CPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from packaging.version import Version
from torch import Tensor, nn

from .engines import Engine, OptimizerState
from .train_arguments import TrainArguments

_OLDEST = "0.19.8"  # those before may give a norm of 1 where the gradient is not finite
_BUCKET = 2**24  # numbers that processes add up at a time; for those of its own DeepSpeed would set aside 2 GB
_MOMENTS = ("exp_avg", "exp_avg_sq")


def is_zero(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def check_zero(accelerator: Accelerator) -> None:
    """Refuse what DeepSpeed would do otherwise than a run without it.

    Raises:
        ValueError: for old versions of it, stages but 1 and 2 (3 shards the weights), offloading (another Adam), fp16
            (the scale of the loss would be DeepSpeed's) and torch.compile (it would be left out without a word).
    """
    if not is_zero(accelerator):
        return
    if Version(version("deepspeed")) < Version(_OLDEST):
        raise ValueError(
            f"DeepSpeed {version('deepspeed')} is too old, at least {_OLDEST} is needed: "
            'pip install "colora-peft[deepspeed]".'
        )
    plugin = accelerator.deepspeed_plugin
    if plugin.zero_stage not in (1, 2):
        raise ValueError(
            f"ZeRO stage {plugin.zero_stage} of DeepSpeed is not supported: set `zero_stage` to 1 or 2, or launch "
            "with FSDP version 2 where the network does not fit (examples/accelerate_configs)."
        )
    if plugin.hf_ds_config.is_offload():
        raise ValueError("Offloading by DeepSpeed is not supported: set its devices to none.")
    if accelerator.mixed_precision == "fp16":
        raise ValueError("fp16 under DeepSpeed is not supported: launch with --mixed_precision bf16 or no.")
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise ValueError("torch.compile under DeepSpeed is not supported: launch with --dynamo_backend no.")


class ZeroEngine(Engine):
    """A network and AdamW under DeepSpeed, which clips the gradients, steps and forgets them, all in its step.

    In place of all trained parameters DeepSpeed has put one tensor into AdamW, `_share`: the float32 weights that this
    process steps.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, args: TrainArguments, accelerator: Accelerator
    ) -> None:
        import deepspeed

        self._parameters = optimizer.param_groups[0]["params"]
        # Not by Accelerate: its backward pass steps, before the gradient was looked at.
        self.network, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=_configuration(args, accelerator)
        )
        self._adam = optimizer
        (self._share,) = optimizer.param_groups[0]["params"]

    # DeepSpeed gives and takes a parameter's weights at any time, its moments only after a first step, which a resumed
    # run has not made. Moments lie in their tensors as weights do in `_share`, so they take the way of the weights.

    @property
    def state(self) -> OptimizerState:
        """Adam's state, gathered. Every process must ask for it."""
        from deepspeed.utils import safe_get_full_fp32_param

        own = self._adam.state.get(self._share)
        if own is None:
            return {}
        state = {parameter: {"step": own["step"].clone()} for parameter in self._parameters}
        for key in _MOMENTS:
            self._share.data.copy_(own[key])
            for parameter in self._parameters:
                state[parameter][key] = safe_get_full_fp32_param(parameter)
        self._take_weights()
        return state

    @state.setter
    def state(self, state: OptimizerState) -> None:
        """Also goes on from the weights that the network has now."""
        from deepspeed.utils import safe_set_full_fp32_param

        self._adam.state.clear()
        if state:
            own = {"step": max(of_one["step"] for of_one in state.values()).clone()}
            for key in _MOMENTS:
                for parameter in self._parameters:  # one without a state never had a gradient
                    safe_set_full_fp32_param(parameter, state.get(parameter, {}).get(key, torch.zeros_like(parameter)))
                own[key] = self._share.detach().clone()
            self._adam.state[self._share] = own
        self._take_weights()

    def _take_weights(self) -> None:
        self.network.optimizer.refresh_fp32_params()

    def set_learning_rate(self, rate: float) -> None:
        for group in self._adam.param_groups:
            group["lr"] = rate

    def batch(self, is_last: bool) -> AbstractContextManager[Any]:
        self.network.set_gradient_accumulation_boundary(is_last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.network.backward(loss)

    def clip(self) -> Tensor:
        return self.network.optimizer.scaled_global_norm()  # infinite if it is NaN; the scale is 1

    def step(self) -> None:
        self.network.step()

    def release(self) -> None:
        self.network.destroy()
        self.network.module_forward_pre_hook.remove()
        self.network.module_forward_post_hook.remove()
        for parameter in self._parameters:
            parameter.data = parameter.detach().clone()  # no longer a view of DeepSpeed's one tensor


def _configuration(args: TrainArguments, accelerator: Accelerator) -> dict[str, Any]:
    """DeepSpeed's, from that of the launch and the run's settings."""
    batch_size, batches = args.per_device_train_batch_size, args.gradient_accumulation_steps
    settings = accelerator.deepspeed_plugin.deepspeed_config
    return {
        **settings,
        "zero_optimization": {"reduce_bucket_size": _BUCKET, **settings["zero_optimization"]},
        "train_batch_size": batch_size * batches * accelerator.num_processes,
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": batches,
        "gradient_clipping": args.max_grad_norm,
        "zero_allow_untested_optimizer": True,  # AdamW of PyTorch
        "bf16": {"enabled": False},  # would round the weights
        "torch_autocast": {
            "enabled": accelerator.mixed_precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # would add up their gradients in bf16
        },
    }
