"""Weighted sums of adapters: two tasks in one adapter, or one task taken away from another.

Adapter i has the delta s_i B_i A_i, with its scaling s_i. Weights w_i may be negative.

- "cat": sum of w_i delta_i, exactly. Factors stand side by side, so ranks add up. Where they would cost as much as the
  weight, the sum is kept dense.
- "svd": the nearest matrix to that sum of rank `svd_rank`, or of the highest rank that an adapter has in the layer. A
  dense layer keeps the sum.
- "linear": factors are averaged, (sum a_i B_i)(sum b_i A_i) with a_i = sqrt|w_i s_i| and b_i = a_i sign(w_i s_i). The
  result has cross terms B_i A_j: it is cheap and rough, as in PEFT's LoRA, and exact in dense layers.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from colora_peft.utils import some

from .config import CoLoRAConfig
from .deltas import check_new_name
from .layer import CoLoRALayer
from .scaling import adapter_scaling

COMBINATION_TYPES = ("cat", "linear", "svd")


@dataclass(frozen=True)
class Blend:
    """The arguments of `CoLoRAModel.add_weighted_adapter`."""

    adapters: list[str]
    weights: list[float]
    adapter_name: str
    combination_type: str
    svd_rank: int | None

    def check(self, configs: Mapping[str, CoLoRAConfig]) -> None:
        """Checks that it can be made of the adapters in `configs`, as far as that does not depend on the layers."""
        adapters, weights = self.adapters, self.weights
        if not adapters:
            raise ValueError(f"There are no adapters to blend: name some of {some(sorted(configs))}.")
        unknown = [adapter for adapter in adapters if adapter not in configs]
        if unknown:
            raise ValueError(f"There is no adapter {some(unknown)} to blend: name some of {some(sorted(configs))}.")
        if len(set(adapters)) != len(adapters):
            raise ValueError(f"The adapters to blend are {some(adapters)}: name each once, and add up its weights.")
        if len(weights) != len(adapters) or not all(math.isfinite(weight) for weight in weights):
            raise ValueError(f"The weights are {list(weights)}: give a finite number for each of {some(adapters)}.")
        if not any(weights):
            raise ValueError(
                "All weights are 0, so the blend would be the base network: use disable_adapter() instead."
            )
        check_new_name(self.adapter_name, configs)
        if self.combination_type not in COMBINATION_TYPES:
            raise ValueError(
                f"The combination_type is {self.combination_type!r}: choose one of {', '.join(COMBINATION_TYPES)}."
            )
        if self.svd_rank is not None and (self.combination_type != "svd" or self.svd_rank < 1):
            raise ValueError(f"The svd_rank is {self.svd_rank}: give a rank of at least 1, and only with 'svd'.")
        for adapter in adapters:
            if configs[adapter].modules_to_save or configs[adapter].bias != "none":
                raise ValueError(
                    f"Adapter {adapter!r} trains whole modules or biases (modules_to_save, bias), which have no delta "
                    "to add up: blend adapters without them."
                )


@torch.no_grad()
def blend_adapters(
    layers: Mapping[str, CoLoRALayer], configs: Mapping[str, CoLoRAConfig], blend: Blend
) -> tuple[CoLoRAConfig, dict[str, dict[str, Tensor]]]:
    """Returns the configuration of the weighted sum, and by layer the weights for `CoLoRALayer.place_adapter`.

    Nothing is changed. `layers` are the adapted layers by full name, `configs` the configurations of the adapters.
    """
    blend.check(configs)
    adapters = blend.adapters
    first = configs[adapters[0]]
    ranks = dict.fromkeys((name for adapter in adapters for name in configs[adapter].ranks), 0)
    blends = {}
    for name, layer in layers.items():
        parts = [
            (adapter, weight)
            for adapter, weight in zip(adapters, blend.weights, strict=True)
            if adapter in layer.rank and weight != 0
        ]
        if parts:
            ranks[name] = _blended_rank(name, layer, [adapter for adapter, _ in parts], blend)
            scaling = adapter_scaling(ranks[name], *layer.matrix_shape, first.colora_alpha, first.method_version)
            blends[name] = _blended_weights(layer, parts, ranks[name], scaling, blend.combination_type)
    # The ranks alone say where the blend is.
    config = replace(
        first,
        ranks=ranks,
        target_modules={name for name, rank in ranks.items() if rank > 0},
        exclude_modules=None,
        contributions=None,
        min_rank_pattern={},
        max_rank_pattern={},
        layers_to_transform=None,
        layers_pattern=None,
        inference_mode=True,
    )
    return config, blends


def _blended_rank(name: str, layer: CoLoRALayer, adapters: list[str], blend: Blend) -> int:
    """Returns the rank of the sum in one layer, as configurations write it."""
    own = [layer.rank[adapter] for adapter in adapters]
    if blend.combination_type == "cat":
        return layer.matrix_shape.stored_rank(sum(own))
    if blend.combination_type == "svd":
        return layer.matrix_shape.stored_rank(blend.svd_rank or max(own))
    if len(set(own)) > 1:
        raise ValueError(
            f"Layer {name!r} has ranks {own} in {some(adapters)}, which combination_type='linear' cannot average: use "
            "'cat' or 'svd'."
        )
    return own[0]


def _blended_weights(
    layer: CoLoRALayer, parts: Iterable[tuple[str, float]], rank: int, scaling: float, combination_type: str
) -> dict[str, Tensor]:
    """Returns the parameters of the sum in one layer by parameter name, as `CoLoRALayer.place_adapter` takes them."""
    if layer.matrix_shape.is_dense(rank):
        return {"colora_dense": _sum_of_deltas(layer, parts) / scaling}
    if combination_type == "svd":
        delta = _sum_of_deltas(layer, parts)
        dtype = torch.promote_types(delta.dtype, torch.float32)  # PyTorch has no SVD of 16 bits
        left, sizes, right = (part.to(delta.dtype) for part in torch.linalg.svd(delta.to(dtype), full_matrices=False))
        # Both factors alike, as training leaves them; contiguous, or safetensors refuses them.
        roots = (sizes[:rank] / scaling).sqrt()
        down, up = roots[:, None] * right[:rank], left[:, :rank] * roots
        return {"colora_A": down.contiguous(), "colora_B": up.contiguous()}
    factors = [(layer.colora_B[adapter], layer.colora_A[adapter], w * layer.scaling[adapter]) for adapter, w in parts]
    if combination_type == "cat":
        up = torch.cat([share / scaling * up for up, _, share in factors], dim=1)
        return {"colora_A": torch.cat([down for _, down, _ in factors]), "colora_B": up}
    up = sum(math.sqrt(abs(share)) * up for up, _, share in factors)
    down = sum(math.copysign(math.sqrt(abs(share)), share) * down for _, down, share in factors)
    return {"colora_A": down, "colora_B": up / scaling}


def _sum_of_deltas(layer: CoLoRALayer, parts: Iterable[tuple[str, float]]) -> Tensor:
    return sum(weight * layer.delta_matrix(adapter) for adapter, weight in parts)
