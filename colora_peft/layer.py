"""The CoLoRA layer: a convolution or linear layer that runs once, with a low-rank or dense delta on its weight.

y = layer(x; W0 + sum over active adapters of delta_W), delta_W = scaling * (B @ A).view_as(W0). Because the delta has
the shape of the weight, groups, stride, dilation, padding modes, transposed convolutions and merging need no case of
their own, and no second branch runs over the feature maps.

Shapes throughout: W0 is (d, ...) as the layer stores it, d = W0.shape[0], k = W0.numel() / d; A is (r, k), B (d, r).
"""

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from .adaptable import weight_matrix_shape
from .allocation import is_dense, stored_rank
from .kept_weight import KeptWeight, keep_weight
from .run_layer import factors_save_time, run_with_factors, run_with_weight

INITIAL_STD = 0.1
"""Standard deviation of B, and of a dense delta, under `init_weights=False`."""


def adapter_scaling(rank: int, d: int, k: int, colora_alpha: float) -> float:
    """Factor before the delta of a (d, k) layer: colora_alpha / sqrt(rank) for factors, / sqrt(k) for a dense delta.

    Our choice, not the paper's: one learning rate shall suit every rank. Adam moves each parameter by about lr a step,
    whatever its gradient. With A ~ N(0, 1/k) and B = 0 the first step changes an entry of W by

        scaling * lr * |sum of rank entries of A, signs at random| ~ scaling * lr * sqrt(rank) / sqrt(k)

    through factors, and by scaling * lr through a dense delta. The rule makes both colora_alpha * lr / sqrt(k): the
    same at any rank, and the same share of the 1/sqrt(k) at which weights of fan-in k usually lie. (In a transposed
    convolution k is the fan-out of one input channel instead.)
    """
    return colora_alpha / math.sqrt(k if is_dense(rank, d, k) else rank)


class CoLoRALayer(nn.Module, BaseTunerLayer):
    """A layer with one delta of its own rank for each adapter; `base_layer` keeps the frozen W0.

    Parameters by adapter name: `colora_A` (r, k) and `colora_B` (d, r), or `colora_dense` (d, k) where factors would
    cost as much. All are matrices: `.to(memory_format=torch.channels_last)` would give a parameter of four dimensions
    strides that safetensors refuses.

    In evaluation mode, and where no gradient is to flow into it, the effective weight is kept between calls: one more
    copy of the weight (and, where the adapter is still trainable, of the adapter), gone with `train()`, `eval()`,
    `.to()` and every change of a weight that PyTorch counts. Writing into the `.data` of frozen weights is not
    counted: call `eval()` afterwards. On a GPU nothing is kept of a trainable adapter.
    """

    adapter_layer_names: tuple[str, ...] = ("colora_A", "colora_B", "colora_dense")
    other_param_names: tuple[str, ...] = ("rank", "scaling")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.colora_A = nn.ParameterDict()
        self.colora_B = nn.ParameterDict()
        self.colora_dense = nn.ParameterDict()
        self.rank: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = []
        self._kept: KeptWeight | None = None

    def update_layer(self, adapter_name: str, rank: int, colora_alpha: float, init_weights: bool = True) -> None:
        """Add adapter `adapter_name` of `rank` >= 1, or make it anew; A is drawn from torch's global generator.

        With `init_weights` the delta starts at zero, otherwise at random (for tests).
        """
        d, k = weight_matrix_shape(self.get_base_layer())
        for container in (self.colora_A, self.colora_B, self.colora_dense):
            if adapter_name in container:
                del container[adapter_name]
        self.rank[adapter_name] = stored_rank(rank, d, k)
        self.scaling[adapter_name] = adapter_scaling(rank, d, k, colora_alpha)
        if is_dense(rank, d, k):
            self.colora_dense[adapter_name] = nn.Parameter(torch.zeros(d, k))
            up = self.colora_dense[adapter_name]
        else:
            self.colora_A[adapter_name] = nn.Parameter(torch.empty(rank, k))
            self.colora_B[adapter_name] = nn.Parameter(torch.zeros(d, rank))
            # Registered first, drawn then: PEFT's low_cpu_mem_usage moves parameters to `meta` on registration.
            nn.init.normal_(self.colora_A[adapter_name], std=1 / math.sqrt(k))
            up = self.colora_B[adapter_name]
        if not init_weights:
            nn.init.normal_(up, std=INITIAL_STD)
        self._kept = None
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """delta_W of `adapter` in W0's shape and dtype, differentiable in the adapter's parameters.

        Raises:
            ValueError: This layer has no such adapter.
        """
        if adapter not in self.scaling:
            raise ValueError(f"This layer has no adapter {adapter!r}, only {sorted(self.scaling)}.")
        weight = self.get_base_layer().weight
        device_type = weight.device.type
        if torch.is_autocast_enabled(device_type):
            # Autocast would build the delta in 16 bits: merged and unmerged would differ.
            with torch.autocast(device_type, enabled=False):
                return self._delta_matrix(adapter).view(weight.shape).to(weight.dtype)
        return self._delta_matrix(adapter).view(weight.shape).to(weight.dtype)

    def _delta_matrix(self, adapter: str) -> Tensor:
        """The delta as a (d, k) matrix; the scaling goes onto B, which has fewer numbers than the product."""
        if adapter in self.colora_dense:
            return self.scaling[adapter] * self.colora_dense[adapter]
        return (self.scaling[adapter] * self.colora_B[adapter]) @ self.colora_A[adapter]

    def effective_weight(self) -> Tensor:
        """W0 plus the deltas of the active adapters, in W0's shape and dtype; W0 itself if none is in this layer.

        Adapters are added one by one, as `merge` does, so that both round alike.
        """
        weight = self.get_base_layer().weight
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                weight = weight + self.get_delta_weight(adapter)
        return weight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the base layer's forward, with the effective weight."""
        kept = self._kept
        if kept is not None and not torch.compiler.is_compiling() and kept.is_current(self.scaling):
            return run_with_weight(kept.base, kept.weight, x, *args, **kwargs)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        if self.training and not args and not kwargs:
            factors = self._factors_to_train(x)
            if factors is not None:
                return run_with_factors(self.base_layer, *factors, x)
        return run_with_weight(self.base_layer, self._weight_to_run(), x, *args, **kwargs)

    def _factors_to_train(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """(scaling * B, A) of the active adapter if there is one, it is trained, and its factors are faster alone."""
        adapters = [adapter for adapter in self.active_adapters if adapter in self.scaling]
        if len(adapters) != 1 or adapters[0] in self.colora_dense or not torch.is_grad_enabled():
            return None
        up, down = self.colora_B[adapters[0]], self.colora_A[adapters[0]]
        if not (up.requires_grad or down.requires_grad) or up.dtype != x.dtype or down.dtype != x.dtype:
            return None
        if not factors_save_time(self.base_layer, down.shape[0], x):
            return None
        return self.scaling[adapters[0]] * up, down

    def _weight_to_run(self) -> Tensor:
        """The effective weight, which is kept for the next call if that may be."""
        if self.training or torch.compiler.is_compiling():
            return self.effective_weight()
        scaling = {adapter: self.scaling[adapter] for adapter in self.active_adapters if adapter in self.scaling}
        containers = (self.colora_A, self.colora_B, self.colora_dense)
        grad_enabled = torch.is_grad_enabled()  # before inference_mode(False), which would enable it
        # Not an inference tensor: it may be needed later where gradients flow to the input.
        with torch.inference_mode(False), torch.set_grad_enabled(grad_enabled):
            weight = self.effective_weight()
            self._kept = keep_weight(weight.detach(), self.base_layer, containers, scaling)
        return weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the deltas of `adapter_names` (None: the active ones) into W0, all of them or, on an error, none.

        That holds for this layer. Where PEFT merges a whole network, the layers before a refused one stay merged:
        after `merge_adapter`, `unmerge_adapter` undoes them.

        Raises:
            ValueError: Under `safe_merge`, the merged weight would not be finite; W0 is left as it was.
        """
        weight = self.get_base_layer().weight
        adapters = [adapter for adapter in check_adapters_to_merge(self, adapter_names) if adapter in self.scaling]
        merged = weight.data
        for adapter in adapters:
            merged = merged + self.get_delta_weight(adapter).detach()
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(
                    f"Merging adapter {adapter!r} gives NaN or infinite weights: it is broken, train or load it again."
                )
        if adapters:
            weight.data = merged
        self.merged_adapters += adapters
        self._kept = None

    def unmerge(self) -> None:
        """Take the merged deltas out of W0 again.

        By subtraction, which restores W0 up to one rounding of W0 + delta (1e-7 of it in float32, but 4e-3 in
        bfloat16): a copy of W0 would be exact at the price of a second network in memory.
        """
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            if adapter in self.scaling:
                self.get_base_layer().weight.data -= self.get_delta_weight(adapter).detach()
        self._kept = None

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As BaseTunerLayer.set_adapter; forgets the kept weight."""
        self._kept = None
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """As BaseTunerLayer.enable_adapters; forgets the kept weight."""
        self._kept = None
        super().enable_adapters(enabled)

    def train(self, mode: bool = True) -> "CoLoRALayer":
        """As nn.Module.train; forgets the kept weight."""
        self._kept = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> "CoLoRALayer":
        # .to(), .half(), .cuda(): without this the kept weight would hold on to memory of the old device.
        self._kept = None
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles start without the kept weight, which they can compute.
        return {**self.__dict__, "_kept": None}
