"""PEFT's own LoRA under a budget like that of CoLoRA, for comparison."""

from __future__ import annotations

import re
from fractions import Fraction

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from colora_peft.ranks import adaptable_layers, weight_matrix_shape

LORA_LAYERS = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


def add_peft_lora(model: nn.Module, parameter_budget: float) -> PeftModel:
    """Adds adapters of PEFT's LoRA of the highest rank that the budget pays for, with PEFT's defaults for the rest.

    Linear layers and convolutions without groups are adapted. With groups, PEFT needs a rank that the groups divide:
    in depthwise convolutions that is more than they weigh. PEFT does not adapt transposed convolutions. Thin layers
    get factors even where these hold more numbers than the weight.

    Args:
        model: The pre-trained network.
        parameter_budget: Share of the weights of all layers that CoLoRA can adapt, those with groups included.

    Raises:
        ValueError: The budget does not pay for rank 1, or there is no such layer.
    """
    rank, taken = lora_rank(model, parameter_budget)
    # A pattern, because PEFT takes a name in a list for the end of longer ones as well.
    return get_peft_model(model, LoraConfig(r=rank, target_modules="|".join(re.escape(name) for name in taken)))


def lora_rank(model: nn.Module, parameter_budget: float) -> tuple[int, list[str]]:
    """Returns the rank of `add_peft_lora`, and the names of the layers that it adapts; it raises the same."""
    layers = adaptable_layers(model)
    taken = [name for name, layer in layers.items() if isinstance(layer, LORA_LAYERS) and groups_of(layer) == 1]
    if not taken:
        raise ValueError(f"{type(model).__name__} has no layer that PEFT's LoRA adapts.")
    allowed = Fraction(str(parameter_budget)) * sum(layer.weight.numel() for layer in layers.values())
    rank = allowed // sum(sum(weight_matrix_shape(layers[name])) for name in taken)
    if rank < 1:
        raise ValueError(f"A budget of {parameter_budget:g} does not pay for rank 1 of PEFT's LoRA in every layer.")
    return int(rank), taken


def groups_of(layer: nn.Module) -> int:
    """Number of groups of a convolution; 1 for other layers."""
    return getattr(layer, "groups", 1)
