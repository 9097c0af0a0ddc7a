"""From the weights of layers to their scores: names, filters, and checks that every estimator shares."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from colora_peft.ranks import adaptable_layers

from .weight_space import moving_parameters

_OVERFLOW = (
    "so the gradient overflowed although the loss is finite: use float32 instead of half precision, or check the loss."
)


def scored_weights(model: nn.Module) -> dict[str, str]:
    """Returns the parameter name of each adaptable layer's weight by layer name, in network order."""
    names = {id(parameter): name for name, parameter in moving_parameters(model).items()}
    return {layer_name: names[id(layer.weight)] for layer_name, layer in adaptable_layers(model).items()}


def filter_score(attribution: Tensor) -> float:
    """Returns the sum over the filters of |sum of a filter's attributions|, divided by the number of weights.

    Signs cancel within a filter, not between filters. Filter j is attribution[j], whatever the kind of layer.
    """
    filters = attribution.flatten(1).sum(dim=1, dtype=torch.float64)
    return filters.abs().sum().item() / attribution.numel()


def check_finite(scores: Mapping[str, float], path_integral: float = 0.0) -> None:
    """Checks that the attributions of an estimate are finite."""
    for layer, score in scores.items():
        if not math.isfinite(score):
            raise ValueError(f"Layer '{layer}': its score is {score}, {_OVERFLOW}")
    if not math.isfinite(path_integral):
        raise ValueError(f"A bias or norm: its attribution is not finite, {_OVERFLOW}")


def unreached_layers(weights: Mapping[str, str], reached: set[str]) -> tuple[str, ...]:
    """Returns the layers without a gradient in any batch, which must not be all."""
    unreached = tuple(layer for layer, name in weights.items() if name not in reached)
    if len(unreached) == len(weights):
        raise ValueError(
            f"The loss reaches none of the {len(weights)} layers, so every score would be 0: loss_fn must compute it "
            "from the output of the model that it is given."
        )
    return unreached
