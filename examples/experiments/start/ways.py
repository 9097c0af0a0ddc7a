"""Ways to begin an adaptation: how A is drawn and scaled, where the ranks go, and what is trained besides."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from colora_peft import CoLoRAConfig, CoLoRALayer, adaptable_layers, weight_matrix_shape
from colora_peft.inference import evaluation_mode, restoration_loss
from colora_peft.ranks import MatrixShape, common_rank
from examples.experiments.methods.peft_lora import add_peft_lora, groups_of, lora_rank
from examples.experiments.methods.plan import PEFT_LORA
from examples.experiments.scaling.run import RULES, apply_rule

PREFIX = "base_model.model."
"""The prefix that PEFT puts before the names of layers."""


class Way(NamedTuple):
    """A way to begin CoLoRA."""

    rule: str
    """A name in `examples.experiments.scaling.run.RULES`: the spread of A, and the factor before the delta."""
    is_aligned: bool = False
    """Whether the rows of A are the leading right singular vectors of the mean gradient, as long as drawn ones."""
    ranks: Literal["score", "gain", "lora", "one"] = "score"
    """By contribution, by marginal gain (`ranks_by_gain`), those of PEFT's LoRA, or one for all layers."""
    has_depthwise: bool = True
    """Whether layers with groups are adapted, too."""
    trains_rest: bool = False
    """Whether biases, norms and whatever else no adapter covers are trained, too."""


WAYS: Mapping[str, Way | None] = {
    PEFT_LORA: None,
    "colora": Way("linear_unit"),
    "lora_start": Way("lora_linear"),
    "aligned": Way("lora_linear", is_aligned=True),
    "gain": Way("lora_linear", is_aligned=True, ranks="gain"),
    "lora_ranks": Way("lora_linear", is_aligned=True, ranks="lora"),
    "colora_lora_ranks": Way("linear_unit", ranks="lora"),
    "one_rank": Way("linear_unit", ranks="one"),
    "no_depthwise": Way("linear_unit", has_depthwise=False),
    "rest": Way("lora_linear", is_aligned=True, trains_rest=True),
}
"""All ways by name."""
TITLES = {
    PEFT_LORA: "PEFT's LoRA",
    "colora": "CoLoRA",
    "lora_start": "CoLoRA, start of PEFT's LoRA",
    "aligned": "CoLoRA, A along the gradient",
    "gain": "CoLoRA, A along the gradient, ranks by gain",
    "lora_ranks": "CoLoRA, A along the gradient, ranks of PEFT's LoRA",
    "colora_lora_ranks": "CoLoRA, ranks of PEFT's LoRA",
    "one_rank": "one rank for all layers",
    "no_depthwise": "CoLoRA without depthwise layers",
    "rest": "CoLoRA, A along the gradient, biases and norms trained",
}
"""Titles of the ways in tables."""


def begin(network: nn.Module, name: str, batches: Sequence[dict[str, Tensor]], parameter_budget: float) -> PeftModel:
    """Returns the network with a new adapter that begins in the way of this name."""
    way = WAYS[name]
    if way is None:
        return add_peft_lora(network, parameter_budget)
    gradients = mean_gradients(network, batches)
    config = CoLoRAConfig(parameter_budget=parameter_budget)
    if not way.has_depthwise:
        layers = adaptable_layers(network)
        gradients = {name: own for name, own in gradients.items() if groups_of(layers[name]) == 1}
        config.target_modules = set(gradients)
    if way.ranks == "score":
        config.contributions = {layer: gradient.abs().mean().item() for layer, gradient in gradients.items()}
    elif way.ranks == "one":
        config.ranks = common_rank([gradient.shape for gradient in gradients.values()], parameter_budget)
    elif way.ranks == "gain":
        config.ranks = ranks_by_gain(gradients, parameter_budget)
    else:
        rank, taken = lora_rank(network, parameter_budget)
        config.ranks = {layer: rank if layer in taken else 0 for layer in gradients}
    model = get_peft_model(network, config)
    apply_rule(model, RULES[way.rule])
    if way.is_aligned:
        align(model, gradients)
    if way.trains_rest:
        weights = {layer.weight for layer in adaptable_layers(model.get_base_model()).values()}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter not in weights)
    return model


def mean_gradients(network: nn.Module, batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the gradient (d, k) of the mean loss with respect to each layer's weight, at the network's weights."""
    layers = adaptable_layers(network)
    weights = [layer.weight for layer in layers.values()]
    sums = [torch.zeros(weight_matrix_shape(layer), device=layer.weight.device) for layer in layers.values()]
    with evaluation_mode(network):
        for batch in batches:
            gradients = torch.autograd.grad(restoration_loss(network, batch) / len(batches), weights)
            for total, gradient in zip(sums, gradients, strict=True):
                total += gradient.reshape(total.shape)
    return dict(zip(layers, sums, strict=True))


def ranks_by_gain(gradients: Mapping[str, Tensor], parameter_budget: float) -> dict[str, int]:
    """Returns the ranks that greedily buy the largest sum of singular values of the gradients for each parameter.

    To first order, equally long steps along the first r pairs of singular vectors lower the loss in proportion to
    the sum of the first r singular values. So each further rank has a gain and a price, and the best of all layers is
    bought next.
    """
    shapes = {name: MatrixShape(*gradient.shape) for name, gradient in gradients.items()}
    left = int(parameter_budget * sum(shape.size for shape in shapes.values()))
    offers = {name: _offers(gradient, shapes[name]) for name, gradient in gradients.items()}
    heap = [(-own[0][0], name, 0) for name, own in offers.items()]
    heapq.heapify(heap)
    ranks = dict.fromkeys(gradients, 0)
    while heap:
        _, name, index = heapq.heappop(heap)
        _, price, rank = offers[name][index]
        if price > left:
            continue
        left -= price
        ranks[name] = rank
        if index + 1 < len(offers[name]):
            heapq.heappush(heap, (-offers[name][index + 1][0], name, index + 1))
    return ranks


def _offers(gradient: Tensor, shape: MatrixShape) -> list[tuple[float, int, int]]:
    """Returns gain for each parameter, price and rank of each level above the one before."""
    values, offers, paid, gained = torch.linalg.svdvals(gradient), [], 0, 0.0
    for rank in shape.levels:
        price, gain = shape.parameters(rank), (values if shape.is_dense(rank) else values[:rank]).sum().item()
        offers.append(((gain - gained) / (price - paid), price - paid, rank))
        paid, gained = price, gain
    return offers


@torch.no_grad()
def align(model: PeftModel, gradients: Mapping[str, Tensor]) -> None:
    """Turns the first rows of each A to the leading right singular vectors of the gradient, at their mean length."""
    for name, module in model.named_modules():
        if isinstance(module, CoLoRALayer) and "default" in module.colora_A:
            factor = module.colora_A["default"]
            vectors = torch.linalg.svd(gradients[name.removeprefix(PREFIX)], full_matrices=False).Vh[: len(factor)]
            length = factor.square().mean().sqrt() * factor.shape[1] ** 0.5
            factor[: len(vectors)] = length * vectors
