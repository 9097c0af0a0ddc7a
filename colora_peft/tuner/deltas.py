"""The parameters of an adapted layer: its base layer, and for each adapter a delta of a rank of its own.

Shapes throughout: W0 is (d, ...) as the layer stores it, d = W0.shape[0], k = W0.numel() / d; A is (r, k), B (d, r).
"""

from collections.abc import Container, Iterable, MutableMapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from colora_peft.ranks import MatrixShape, weight_matrix_shape

from .peft_internals import move_to_base_device
from .scaling import METHOD_VERSION, STD_OF_A, adapter_scaling

INITIAL_STD = 0.02
"""Standard deviation of B, and of a dense delta, under `init_weights=False`."""

_TAKEN_NAMES = frozenset(dir(nn.ParameterDict()))


def check_adapter_name(name: str) -> None:
    """Checks that PyTorch can hold the parameters of an adapter called `name`."""
    if not name or "." in name:
        raise ValueError(f"The adapter name {name!r} cannot be part of parameter names: use letters, digits, -, _.")
    if name in _TAKEN_NAMES:
        raise ValueError(f"The adapter name {name!r} is that of an attribute of nn.ParameterDict: choose another.")


def check_new_name(name: str, taken: Container[str]) -> None:
    """Checks that a new adapter may be called `name`, which must not be among the names that are `taken`."""
    check_adapter_name(name)
    if name in taken:
        raise ValueError(f"There is already an adapter {name!r}: delete it first, or choose another name.")


def rename_key(entries: MutableMapping[str, Any] | nn.ParameterDict | nn.ModuleDict, old: str, new: str) -> None:
    """Calls entry `old`, if there is one, `new`, in place and without a change of the order."""
    if old in entries:
        renamed = {new if name == old else name: entry for name, entry in entries.items()}
        entries.clear()
        entries.update(renamed)


def delta_shapes(shape: MatrixShape, rank: int) -> dict[str, tuple[int, int]]:
    """Returns the shape of each parameter of a delta of `rank` >= 1 by its name in `DeltaStore`."""
    if shape.is_dense(rank):
        return {"colora_dense": shape}
    return {"colora_A": (rank, shape.k), "colora_B": (shape.d, rank)}


class DeltaStore(nn.Module, BaseTunerLayer):
    """The parameters of the adapters of one layer, by adapter name, and the deltas that they make.

    A delta has the parameters `colora_A` (r, k) and `colora_B` (d, r), or `colora_dense` (d, k) where factors would
    cost as much. All are matrices: `.to(memory_format=torch.channels_last)` would give a parameter of four dimensions
    strides that safetensors refuses.
    """

    adapter_layer_names: tuple[str, ...] = ("colora_A", "colora_B", "colora_dense")
    other_param_names: tuple[str, ...] = ("rank", "colora_alpha", "method_version", "scaling")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        linear = isinstance(base_layer, nn.Linear)
        self.in_features: int = base_layer.in_features if linear else base_layer.in_channels
        self.out_features: int = base_layer.out_features if linear else base_layer.out_channels
        self.colora_A = nn.ParameterDict()
        self.colora_B = nn.ParameterDict()
        self.colora_dense = nn.ParameterDict()
        self.rank: dict[str, int] = {}
        self.colora_alpha: dict[str, float] = {}
        self.method_version: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = []

    def _weights_changed(self) -> None:
        """Hook for subclasses, called after every change of what the layer computes."""

    @property
    def matrix_shape(self) -> MatrixShape:
        """Shape (d, k) of W0 as a matrix."""
        return weight_matrix_shape(self.get_base_layer())

    def update_layer(
        self,
        adapter_name: str,
        rank: int,
        colora_alpha: float,
        init_weights: bool = True,
        method_version: int = METHOD_VERSION,
    ) -> None:
        """Adds adapter `adapter_name` of `rank` >= 1, or replaces it; A is drawn from torch's global generator.

        With `init_weights` the delta starts at zero, otherwise at random (for tests).
        """
        start = {name: torch.zeros(shape) for name, shape in delta_shapes(self.matrix_shape, rank).items()}
        self.place_adapter(adapter_name, rank, colora_alpha, start, method_version)
        # Registered first, drawn then: PEFT's low_cpu_mem_usage moves parameters to `meta` on registration.
        if adapter_name in self.colora_A:
            nn.init.normal_(self.colora_A[adapter_name], std=STD_OF_A)
        if not init_weights:
            up = self.colora_dense if adapter_name in self.colora_dense else self.colora_B
            nn.init.normal_(up[adapter_name], std=INITIAL_STD)
        move_to_base_device(self, adapter_name)

    def place_adapter(
        self,
        adapter_name: str,
        rank: int,
        colora_alpha: float,
        weights: dict[str, Tensor],
        method_version: int,
    ) -> None:
        """Gives this layer an adapter with these weights, in place of an older one of its name.

        Args:
            adapter_name: Name of the adapter; whether it is active does not change.
            rank: Rank of the delta, at least 1.
            colora_alpha: Gain; with the rank it gives the scaling.
            weights: `colora_A` (r, k) and `colora_B` (d, r), or `colora_dense` (d, k) if the rank is dense.
            method_version: Version of the rule that gives the scaling.
        """
        self._drop(adapter_name)
        for parameter_name, tensor in weights.items():
            getattr(self, parameter_name)[adapter_name] = nn.Parameter(tensor)
        self.rank[adapter_name] = self.matrix_shape.stored_rank(rank)
        self.colora_alpha[adapter_name] = colora_alpha
        self.method_version[adapter_name] = method_version
        self.set_scale(adapter_name, 1.0)

    def remove_adapter(self, adapter_name: str) -> None:
        """Takes `adapter_name` out of this layer; unlike `delete_adapter`, it activates no other."""
        self._drop(adapter_name)
        self._weights_changed()

    def rename_adapter(self, old: str, new: str) -> None:
        """Calls adapter `old` `new`; nothing else changes."""
        for attribute in self.adapter_layer_names + self.other_param_names:
            rename_key(getattr(self, attribute), old, new)
        self._active_adapter = [new if name == old else name for name in self.active_adapters]
        self.merged_adapters = [new if name == old else name for name in self.merged_adapters]
        self._weights_changed()

    def _drop(self, adapter_name: str) -> None:
        for attribute in self.adapter_layer_names + self.other_param_names:
            if adapter_name in getattr(self, attribute):
                del getattr(self, attribute)[adapter_name]

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiplies the delta of `adapter` as it was trained by `scale`: 0 is the base, 1 the trained adapter.

        Raises:
            ValueError: The adapter is merged, and unmerging would take out another delta than was merged.
        """
        if adapter in self.merged_adapters:
            raise ValueError(f"Adapter {adapter!r} is merged: call unmerge_adapter() before you scale it.")
        if adapter in self.rank:
            self.scaling[adapter] = scale * self._trained_scaling(adapter)
            self._weights_changed()

    def scale_layer(self, scale: float) -> None:
        """Multiplies the deltas of the active adapters by `scale`, on top of earlier scaling."""
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.set_scale(adapter, scale * self.scaling[adapter] / self._trained_scaling(adapter))

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undoes `scale_layer(scale)`; None undoes all scaling of the active adapters.

        Raises:
            ValueError: `scale` is 0, which leaves nothing to undo.
        """
        if scale == 0:
            raise ValueError("A scaling by 0 cannot be divided out: unscale_layer() undoes all scaling at once.")
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                now = self.scaling[adapter] / self._trained_scaling(adapter)
                self.set_scale(adapter, 1.0 if scale is None else now / scale)

    def _trained_scaling(self, adapter: str) -> float:
        rule = self.colora_alpha[adapter], self.method_version[adapter]
        return adapter_scaling(self.rank[adapter], *self.matrix_shape, *rule)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Returns delta_W of `adapter` in W0's shape and dtype, differentiable in the adapter's parameters.

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
                return self.get_delta_weight(adapter)
        return self.delta_matrix(adapter).view(weight.shape).to(weight.dtype)

    def delta_matrix(self, adapter: str) -> Tensor:
        """Returns the delta as a (d, k) matrix; the scaling goes onto B, which has fewer numbers than the product."""
        if adapter in self.colora_dense:
            return self.scaling[adapter] * self.colora_dense[adapter]
        return (self.scaling[adapter] * self.colora_B[adapter]) @ self.colora_A[adapter]

    def weights_of(self, adapter: str) -> list[nn.Parameter]:
        """Returns the parameters of `adapter` in this layer; none if it has no such adapter."""
        stores = (getattr(self, attribute) for attribute in self.adapter_layer_names)
        return [store[adapter] for store in stores if adapter in store]

    def is_empty(self, adapter: str) -> bool:
        """Returns whether B of `adapter`, or its dense delta, is zero or has no values yet."""
        up = self.colora_dense[adapter] if adapter in self.colora_dense else self.colora_B[adapter]
        return up.is_meta or not up.any()

    def effective_weight(self, adapters: Iterable[str] | None = None) -> Tensor:
        """Returns W0 plus the deltas of `adapters` (None: the active ones), in W0's shape and dtype.

        It adds adapters one by one, as `merge` does, so that both round alike.
        """
        weight = self.get_base_layer().weight
        for adapter in self.active_adapters if adapters is None else adapters:
            if adapter in self.scaling:
                weight = weight + self.get_delta_weight(adapter)
        return weight
