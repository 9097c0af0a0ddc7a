"""The CoLoRA layer: a convolution or linear layer that runs once, with a low-rank or dense delta on its weight.

y = layer(x; W0 + sum over active adapters of delta_W), delta_W = scaling * (B @ A).view_as(W0). Because the delta has
the shape of the weight, groups, stride, dilation, padding modes, transposed convolutions and merging need no case of
their own, and no second branch runs over the feature maps.

Shapes throughout: W0 is (d, ...) as the layer stores it, d = W0.shape[0], k = W0.numel() / d; A is (r, k), B (d, r).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .allocation import is_dense, stored_rank

_KINDS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
_CLOSED = AuxiliaryTrainingWrapper | nn.MultiheadAttention | nn.TransformerEncoderLayer
_PLAIN_FORWARDS: frozenset[Callable] = frozenset(kind.forward for kind in _KINDS)
SUPPORTED_LAYERS = ", ".join(kind.__name__ for kind in _KINDS)
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


def weight_matrix_shape(layer: nn.Module) -> tuple[int, int]:
    """(d, k) of a layer's weight: its first dimension and the product of the others, whatever the kind of layer."""
    weight = layer.weight
    return weight.shape[0], weight.numel() // weight.shape[0]


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that CoLoRA can adapt by full module name, in network order.

    A layer that is already adapted appears as its base layer under its own name. Left out are layers that other
    modules run without calling them (inside nn.MultiheadAttention and nn.TransformerEncoderLayer, which read the
    weights directly) and what PEFT trains whole (`modules_to_save`).
    """
    layers = {}
    closed: str | None = None  # prefix of the last module whose inside is not ours; children follow their parent
    for name, module in model.named_modules():
        if closed is not None and name.startswith(closed):
            continue
        if isinstance(module, BaseTunerLayer | _CLOSED):
            closed = f"{name}." if name else ""
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        if why_not_adaptable(module) is None:
            layers[name] = module
    return layers


def why_not_adaptable(layer: nn.Module) -> str | None:
    """None for a layer that CoLoRA can adapt, else the reason as the end of a sentence."""
    if not isinstance(layer, _KINDS):
        return f"CoLoRA adapts {SUPPORTED_LAYERS}"
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight without calling it"
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its weight is computed (weight_norm, spectral_norm, ...): remove the parametrization first"
    if nn.parameter.is_lazy(weight):
        return "its shape is not known yet: run the model once first"
    if not weight.is_floating_point():
        return f"its weight is quantized to {weight.dtype}"
    return None


def run_with_weight(layer: nn.Module, weight: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Output of `layer` for `x` as if `weight` were its weight; further arguments as `layer.forward` takes them.

    Raises:
        TypeError: `layer.forward` does not take the further arguments.
    """
    hooked = "forward" in layer.__dict__ or layer._forward_hooks or layer._forward_pre_hooks
    surplus = (args or kwargs) and not isinstance(layer, nn.ConvTranspose2d)
    if hooked or surplus or type(layer).forward not in _PLAIN_FORWARDS:
        # A subclass or a hook (device_map, feature extraction) adds to the forward pass: let it run, on our weight.
        # A plain layer takes x alone and refuses anything more in its own words.
        return torch.func.functional_call(layer, {"weight": weight}, (x, *args), kwargs)
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, layer.bias)
    if isinstance(layer, nn.ConvTranspose2d):
        return _conv_transpose(layer, weight, x, *args, **kwargs)
    return layer._conv_forward(x, weight, layer.bias)


def _conv_transpose(
    layer: nn.ConvTranspose2d, weight: Tensor, x: Tensor, output_size: list[int] | None = None
) -> Tensor:
    """As nn.ConvTranspose2d.forward; `output_size` picks one of the sizes that stride leaves open."""
    output_padding = layer._output_padding(
        x, output_size, layer.stride, layer.padding, layer.kernel_size, 2, layer.dilation
    )
    return F.conv_transpose2d(
        x, weight, layer.bias, layer.stride, layer.padding, output_padding, layer.groups, layer.dilation
    )


class CoLoRALayer(nn.Module, BaseTunerLayer):
    """A layer with one delta of its own rank for each adapter; `base_layer` keeps the frozen W0.

    Parameters by adapter name: `colora_A` (r, k) and `colora_B` (d, r), or `colora_dense` (d, k) where factors would
    cost as much. All are matrices: `.to(memory_format=torch.channels_last)` would give a parameter of four dimensions
    strides that safetensors refuses.

    In evaluation mode, and if neither W0 nor an active adapter requires a gradient (as after
    `PeftModel.from_pretrained`), the effective weight is kept between calls: one more copy of the weight, gone with
    `train()`, `eval()`, `.to()` and every change of a weight that PyTorch counts. Writing into the `.data` of frozen
    weights is not counted: call `eval()` afterwards.
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
        self._kept: tuple[tuple, Tensor] | None = None

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
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        return run_with_weight(self.base_layer, self._weight_to_run(), x, *args, **kwargs)

    def _weight_to_run(self) -> Tensor:
        """The effective weight, kept from the last call if nothing it depends on has changed."""
        if self.training or torch.compiler.is_compiling():
            return self.effective_weight()
        key = self._weight_key()
        if key is None:
            return self.effective_weight()
        if self._kept is None or self._kept[0][0] != key[0]:
            # Not an inference tensor: it may be needed later where gradients flow to the input.
            with torch.inference_mode(False), torch.no_grad():
                self._kept = (key, self.effective_weight())
        return self._kept[1]

    def _weight_key(self) -> tuple[tuple, list[Tensor]] | None:
        """What the effective weight depends on and aliases of those tensors, or None if it must not be kept.

        Storage address and version change with each write that PyTorch counts. The aliases keep old storages alive:
        a freed address could come back with other content. Trainable tensors are never kept, because some code
        writes into `.data` (averaged weights, for one), which is not counted.
        """
        adapters = [adapter for adapter in self.active_adapters if adapter in self.scaling]
        tensors = [self.get_base_layer().weight]
        for container in (self.colora_A, self.colora_B, self.colora_dense):
            tensors += [container[adapter] for adapter in adapters if adapter in container]
        if any(tensor.requires_grad or type(tensor) is not nn.Parameter for tensor in tensors):
            return None
        try:
            facts = [(tensor.data_ptr(), tensor._version, tensor.dtype, tensor.stride()) for tensor in tensors]
        except RuntimeError:  # inference tensors have no version
            return None
        return (*facts, *((adapter, self.scaling[adapter]) for adapter in adapters)), [t.detach() for t in tensors]

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
