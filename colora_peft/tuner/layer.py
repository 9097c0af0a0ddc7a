"""The CoLoRA layer: a convolution or linear layer that runs once, with a low-rank or dense delta on its weight.

y = layer(x; W0 + sum over active adapters of delta_W), delta_W = scaling * (B @ A).view_as(W0). The delta has the
shape of the weight. So groups, stride, dilation, padding modes, transposed convolutions and merging need no case of
their own, and no second branch runs over the feature maps.

Shapes throughout: W0 is (d, ...) as the layer stores it, d = W0.shape[0], k = W0.numel() / d; A is (r, k), B (d, r).
"""

from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from .deltas import DeltaStore
from .functional import alone_with_weights, factors_save_time, is_plain, run_with_factors, run_with_weight
from .offloading import is_offloaded, onloaded
from .weight_cache import KeptWeight, keep_weight

_GEOMETRY = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
"""Attributes that a module may read of a convolution without calling it."""


class CoLoRALayer(DeltaStore):
    """A layer with one delta of its own rank for each adapter; `base_layer` keeps the frozen W0.

    In evaluation mode, and where no gradient is to flow into it, the effective weight is kept between calls. This
    takes one more copy of the weight, and of the adapter where that is still trainable. The copy is gone with
    `train()`, `eval()`, `.to()` and every change of a weight that PyTorch counts. Writing into the `.data` of frozen
    weights is not counted: call `eval()` afterwards. On a GPU nothing is kept of a trainable adapter.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self._kept: KeptWeight | None = None
        self.adapters_of_batch: set[str] | None = None
        """Names of the adapters that a batch with adapter_names runs with, while it runs."""
        for name in _GEOMETRY:
            if hasattr(base_layer, name):
                setattr(self, name, getattr(base_layer, name))
        # See colora_peft.tuner.hotswap. Not persistent: it follows from the other weights.
        self.register_buffer("pinned_weight", None, persistent=False)
        self.register_load_state_dict_post_hook(_after_loading)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """Runs the base layer with the effective weight, or with that of another adapter for each sample."""
        if is_plain(self.base_layer):
            return self._run(x, *args, adapter_names=adapter_names, **kwargs)
        with alone_with_weights():  # the effective weight takes the place of W0 for a moment
            return self._run(x, *args, adapter_names=adapter_names, **kwargs)

    def _run(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        # Not read while compiling: whether there is one would be a reason to compile again.
        kept = None if torch.compiler.is_compiling() else self._kept
        if kept is not None and adapter_names is None and kept.is_current(self.scaling):
            return run_with_weight(kept.base, kept.weight, x, *args, **kwargs)
        if is_offloaded(self.base_layer) and not self.disable_adapters and not self.merged:
            if adapter_names is not None:
                raise NotImplementedError(
                    "A batch with adapter_names cannot run through offloaded layers: keep them on a device in the "
                    "device_map, or run one adapter at a time (set_adapter)."
                )
            with onloaded(self):
                weight = self.effective_weight()
                return run_with_weight(self.base_layer, weight, x.to(weight.device), *args, **kwargs).to(x.device)
        if adapter_names is not None and not self.disable_adapters:
            return self._forward_mixed_batch(x, *args, adapter_names=adapter_names, **kwargs)
        if self.pinned_weight is not None and torch.compiler.is_compiling() and not self.training:
            return run_with_weight(self.base_layer, self.pinned_weight, x, *args, **kwargs)
        if self.disable_adapters:
            if self.merged and is_offloaded(self.base_layer):
                raise NotImplementedError(
                    "A merged layer that is offloaded cannot run without its adapters: call unmerge_adapter() first."
                )
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

    @property
    def weight(self) -> Tensor:
        """The weight that a call of the layer would run with, for modules that read it in place of calling the layer.

        Gradients flow through it into the adapter. It is the base layer's own parameter where no adapter is at work,
        where adapters are merged, and while it is offloaded, when it has no values.
        """
        if self.disable_adapters and self.merged and not is_offloaded(self.base_layer):
            self.unmerge()
        base = self.get_base_layer()
        if self.disable_adapters or self.merged or is_offloaded(base):
            return base.weight
        if self.adapters_of_batch is not None:
            if len(self.adapters_of_batch) > 1:
                raise NotImplementedError(
                    "A module of the network reads the weight of an adapted layer without calling it, and cannot run "
                    "a batch with several adapter_names: run one adapter at a time (set_adapter)."
                )
            return self.effective_weight(self.adapters_of_batch)
        if torch.compiler.is_compiling():
            pinned = None if self.training else self.pinned_weight
            return self.effective_weight() if pinned is None else pinned
        if self._kept is not None and self._kept.is_current(self.scaling):
            return self._kept.weight
        return self._weight_to_run()

    def _forward_mixed_batch(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        """Runs each sample of x (B, ...) with the one adapter that `adapter_names` (B) gives it.

        A name that has no adapter in this layer, such as "__base__", is the base.
        """
        rows: dict[str, list[int]] = {}
        for row, adapter in enumerate(adapter_names):
            rows.setdefault(adapter, []).append(row)
        outputs = []
        for adapter, own_rows in rows.items():
            samples = x if len(rows) == 1 else x[own_rows]
            outputs.append(
                run_with_weight(self.base_layer, self.effective_weight([adapter]), samples, *args, **kwargs)
            )
        if len(outputs) == 1:
            return outputs[0]
        order = sorted(range(len(adapter_names)), key=sum(rows.values(), []).__getitem__)
        return torch.cat(outputs)[order]

    def _factors_to_train(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Returns (scaling * B, A) of the one active adapter if it is trained and its factors are faster alone."""
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
        """Returns the effective weight, and keeps it for the next call if that may be."""
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
        """Writes the deltas of `adapter_names` (None: the active ones) into W0, all of them or, on an error, none.

        Raises:
            ValueError: Under `safe_merge`, the merged weight would not be finite; W0 is left as it was.
        """
        adapters = [adapter for adapter in check_adapters_to_merge(self, adapter_names) if adapter in self.scaling]
        if adapters:
            self.get_base_layer().weight.data = self.merged_weight(adapters, safe_merge)
        self.merged_adapters += adapters
        self._weights_changed()

    @torch.no_grad()
    def merged_weight(self, adapters: Iterable[str], safe_merge: bool = False) -> Tensor:
        """Returns W0 as it is plus the deltas of `adapters`; nothing is changed.

        Raises:
            ValueError: Under `safe_merge`, it would not be finite.
        """
        merged = self.get_base_layer().weight.data
        for adapter in adapters:
            merged = merged + self.get_delta_weight(adapter)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(
                    f"Merging adapter {adapter!r} gives NaN or infinite weights: it is broken, train or load it again."
                )
        return merged

    def unmerge(self) -> None:
        """Subtracts the merged deltas from W0 again.

        Subtraction gives W0 up to one rounding of W0 + delta: 1e-7 of it in float32, but 4e-3 in bfloat16. A copy of
        W0 would be exact at the price of a second network in memory.
        """
        with alone_with_weights():  # a forward pass without adapters unmerges, and there may be several at once
            while self.merged_adapters:
                adapter = self.merged_adapters[-1]
                if adapter in self.scaling:
                    self.get_base_layer().weight.data -= self.get_delta_weight(adapter).detach()
                self.merged_adapters.pop()
        self._weights_changed()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Does what BaseTunerLayer.set_adapter does."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._weights_changed()

    def enable_adapters(self, enabled: bool) -> None:
        """Does what BaseTunerLayer.enable_adapters does."""
        super().enable_adapters(enabled)
        self._weights_changed()

    def train(self, mode: bool = True) -> "CoLoRALayer":
        """Does what nn.Module.train does; afterwards writes into `.data` count, too."""
        super().train(mode)
        self._weights_changed()
        return self

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Returns whether PEFT's `convert_to_lora` is right for this layer: it knows linear layers alone."""
        return isinstance(self.get_base_layer(), nn.Linear)

    def pin_weight(self, pinned: bool = True) -> None:
        """Lets compiled code for evaluation run on a buffer that changes its content and never its place.

        See colora_peft.tuner.hotswap. False ends this.
        """
        if not pinned:
            self.pinned_weight = None
        elif self.pinned_weight is None:
            self.pinned_weight = self.get_base_layer().weight.detach().clone()
        self._weights_changed()

    @torch.no_grad()
    def _weights_changed(self) -> None:
        """Forgets the kept weight and brings the pinned one up to date."""
        self._kept = None
        if self.pinned_weight is not None and not self.training:
            if self.disable_adapters and self.merged:
                self.unmerge()
            weight = self.get_base_layer().weight
            if not self.disable_adapters and not self.merged:
                weight = self.effective_weight()
            self.pinned_weight.copy_(weight)

    def _apply(self, *args: Any, **kwargs: Any) -> "CoLoRALayer":
        # .to(), .half(), .cuda(): without this the kept weight would hold on to memory of the old device.
        self._kept = None
        return super()._apply(*args, **kwargs)

    def _replicate_for_data_parallel(self) -> "CoLoRALayer":
        # The kept weight is on the first GPU.
        replica = super()._replicate_for_data_parallel()
        replica._kept = None
        return replica

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles start without the kept weight, which they can compute.
        return {**self.__dict__, "_kept": None}


def adapted_layers(model: nn.Module) -> dict[str, CoLoRALayer]:
    """Returns the layers of a network that carry adapters by full module name, in network order."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, CoLoRALayer)}


def carried_adapters(model: nn.Module) -> list[str]:
    """Returns the names of the adapters, of any PEFT method, in the layers of a network, each once."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    stores = [getattr(layer, store, {}) for layer in layers for store in layer.adapter_layer_names]
    return list(dict.fromkeys(adapter for store in stores if hasattr(store, "keys") for adapter in store.keys()))


def _after_loading(layer: CoLoRALayer, incompatible_keys: Any) -> None:
    """Hook after `load_state_dict`; a function of the module, so that layers can be pickled."""
    layer._weights_changed()
