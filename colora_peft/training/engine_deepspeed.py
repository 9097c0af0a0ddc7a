"""DeepSpeed's ZeRO, stages 1 and 2: every process has the whole weights and steps a share of them.

Only that share's moments of Adam are on a process, under stage 2 only its gradients, too. The weights stay float32 and
bf16 is autocast, as without DeepSpeed, so that both train equally and go on with each other's checkpoints. Two
things differ: evaluations in a bf16 run compute in float32, and dropout on a CPU draws other masks, since its pattern
follows the layout in memory.

Not yet run on GPUs; the tests run it over two processes of a CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from packaging.version import Version
from torch import Tensor, nn

from .arguments import TrainArguments
from .engine import Engine, OptimizerState

_OLDEST = "0.19.8"  # earlier ones may give a norm of 1 where the gradient is not finite
_BUCKET = 2**24  # numbers that processes add up at a time; DeepSpeed's own choice would set aside 2 GB
_MOMENTS = ("exp_avg", "exp_avg_sq")


def is_zero(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def check_zero(accelerator: Accelerator) -> None:
    """Refuses settings under which DeepSpeed would train otherwise than a run without it.

    Raises:
        ValueError: for old versions of it, settings in a file of DeepSpeed's, stages but 1 and 2 (3 shards the
            weights), offloading (another Adam), fp16 (the scale of the loss would be DeepSpeed's), fp8 and
            torch.compile (they would be left out without a word).
    """
    if not is_zero(accelerator):
        return
    if Version(version("deepspeed")) < Version(_OLDEST):
        raise ValueError(
            f"DeepSpeed {version('deepspeed')} is too old, at least {_OLDEST} is needed: "
            'pip install -e ".[deepspeed]" in the clone.'
        )
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
        raise ValueError(
            "A file of settings for DeepSpeed is not supported: leave out `deepspeed_config_file` and set "
            "`zero_stage` in the configuration of accelerate (examples/accelerate_configs/deepspeed_zero2.yaml)."
        )
    plugin = accelerator.deepspeed_plugin
    if plugin.zero_stage not in (1, 2):
        raise ValueError(
            f"ZeRO stage {plugin.zero_stage} of DeepSpeed is not supported: set `zero_stage` to 1 or 2, or launch "
            "with FSDP version 2 where the network does not fit (examples/accelerate_configs)."
        )
    offloads = [plugin.get_value(f"zero_optimization.offload_{part}.device") for part in ("optimizer", "param")]
    if any(device not in (None, "none") for device in offloads):
        raise ValueError("Offloading by DeepSpeed is not supported: set its devices to none.")
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            f"{accelerator.mixed_precision} under DeepSpeed is not supported: launch with --mixed_precision "
            "bf16 or no."
        )
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise ValueError("torch.compile under DeepSpeed is not supported: launch with --dynamo_backend no.")


class ZeroEngine(Engine):
    """A network and AdamW under DeepSpeed, which clips the gradients, steps and forgets them, all in its step.

    In place of all trained parameters DeepSpeed has put one tensor into AdamW, `_share`: the float32 weights that this
    process steps.

    Args:
        model: The network, on its device, its tensors contiguous.
        optimizer: AdamW of the parameters that require gradients, which must be float32.
        args: The run's settings.
        accelerator: The run's.

    Raises:
        ValueError: if a trained parameter is not float32.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, args: TrainArguments, accelerator: Accelerator
    ) -> None:
        import deepspeed

        _check_float32(model)
        self._model, self._optimizer, self._parameters = model, optimizer, optimizer.param_groups[0]["params"]
        # Not by Accelerate: its backward pass steps, before the gradient was looked at.
        self.network, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=_configuration(args, accelerator)
        )
        (self._share,) = optimizer.param_groups[0]["params"]

    # DeepSpeed gives and takes a parameter's weights at any time, its moments only after a first step, which a resumed
    # run has not made. Moments lie in their tensors as weights do in `_share`, so they take the way of the weights.

    @property
    def state(self) -> OptimizerState:
        from deepspeed.utils import safe_get_full_fp32_param

        own = self._optimizer.state.get(self._share)
        if own is None:
            return {}
        state = {parameter: {"step": own["step"].clone()} for parameter in self._parameters}
        weights = self._share.detach().clone()
        for key in _MOMENTS:
            self._share.data.copy_(own[key])
            for parameter in self._parameters:
                # Off the device, which may have room for its own share only.
                state[parameter][key] = safe_get_full_fp32_param(parameter).cpu()
        self._share.data.copy_(weights)
        return state

    @state.setter
    def state(self, state: OptimizerState) -> None:
        """Sets the moments, and takes over the weights that the network has now."""
        from deepspeed.utils import safe_set_full_fp32_param

        self._optimizer.state.clear()
        if state:
            own = {"step": max(of_one["step"] for of_one in state.values()).clone()}
            for key in _MOMENTS:
                for parameter in self._parameters:  # one without a state never had a gradient
                    safe_set_full_fp32_param(parameter, state.get(parameter, {}).get(key, torch.zeros_like(parameter)))
                own[key] = self._share.detach().clone()
            self._optimizer.state[self._share] = own
        self.network.optimizer.refresh_fp32_params()

    @contextmanager
    def batch(self, is_last: bool) -> Iterator[None]:
        for buffer in self._model.buffers():  # DDP does so by itself
            torch.distributed.broadcast(buffer, 0)
        self.network.set_gradient_accumulation_boundary(is_last)
        yield

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


def _check_float32(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise ValueError(
                f"DeepSpeed would train {name}, which is {str(parameter.dtype).removeprefix('torch.')}, in float32 "
                "and round it after each step: load the network in float32, bf16 is for --mixed_precision."
            )


def _configuration(args: TrainArguments, accelerator: Accelerator) -> dict[str, Any]:
    """DeepSpeed's settings, without the section bf16, which would round the weights."""
    return {
        "zero_optimization": {"stage": accelerator.deepspeed_plugin.zero_stage, "reduce_bucket_size": _BUCKET},
        "zero_allow_untested_optimizer": True,  # AdamW of PyTorch
        "train_micro_batch_size_per_gpu": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "gradient_clipping": args.max_grad_norm,
        "timers": {"throughput": {"enabled": False}},  # would wait for the device in each step
        "torch_autocast": {
            "enabled": accelerator.mixed_precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # would add up their gradients in bf16
        },
    }
