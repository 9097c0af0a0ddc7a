"""The layers of a network that a configuration adapts, and the rank of each.

PEFT matches target names by suffix; ranks are by exact name. So targets are matched once, before anything is changed.
From then on `config.ranks` alone says which layers are wrapped.
"""

from collections import defaultdict
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from colora_peft.ranks import (
    adaptable_layers,
    allocate_ranks,
    check_known_names,
    check_same_names,
    check_scores,
    names_hint,
    no_adaptable_layer,
    weight_matrix_shape,
    why_not_adaptable,
)
from colora_peft.utils import some

from .config import PRIOR_CONTRIBUTIONS, CoLoRAConfig
from .layer import CoLoRALayer
from .offloading import is_offloaded


def resolve_ranks(config: CoLoRAConfig, model: nn.Module) -> dict[str, int]:
    """Returns the rank of every targeted layer by full name, in network order, 0 included: given, or allocated.

    Raises:
        TypeError: A targeted layer cannot be adapted.
        ValueError: No layer can be adapted, nothing is targeted, every rank is 0, `ranks` or `contributions` name an
            unknown layer or lack a targeted one, a rank pattern matches no targeted layer, a targeted layer or its
            weight is in use in a second place, or `model` is itself a layer.
    """
    layers = adaptable_layers(model)
    if "" in layers:
        raise ValueError(
            f"The model is a single {type(model).__name__} layer, which PEFT cannot replace: wrap it in a module, "
            "for example nn.Sequential(model)."
        )
    if not layers:
        raise ValueError(no_adaptable_layer(model))
    targets = _targeted_layers(config, model, layers)
    given = config.ranks if isinstance(config.ranks, dict) else {}
    _check_used_once({name: layer for name, layer in targets.items() if given.get(name) != 0}, model)
    shapes = {name: weight_matrix_shape(layer) for name, layer in targets.items()}
    if isinstance(config.ranks, dict):
        check_same_names(config.ranks, shapes, "ranks")
        ranks = config.ranks
    elif config.ranks is not None:
        ranks = dict.fromkeys(shapes, config.ranks)
    else:
        return allocate_ranks(
            shapes,
            _targeted_scores(config, model, layers, shapes),
            config.parameter_budget,
            config.beta,
            config.delta_min,
            min_ranks=_matched_ranks(config.min_rank_pattern, shapes, "min_rank_pattern"),
            max_ranks=_matched_ranks(config.max_rank_pattern, shapes, "max_rank_pattern"),
        )
    if not any(ranks.values()):
        raise ValueError("All ranks are 0, so nothing would be trained: give at least one layer a rank of 1.")
    return {name: shape.stored_rank(ranks[name]) for name, shape in shapes.items()}


def _targeted_scores(
    config: CoLoRAConfig, model: nn.Module, layers: Iterable[str], targets: Iterable[str]
) -> dict[str, float] | None:
    """Returns the contributions of the targeted layers, given or of the network's own configuration, or None.

    Scores are measured once for the whole network and serve any choice of targets.
    """
    scores = config.contributions
    if scores is not None:
        check_known_names(scores, layers, "contributions")
    else:
        scores = getattr(getattr(model, "config", None), PRIOR_CONTRIBUTIONS, None)
        if scores is None or config.beta == 0:
            return None
        _check_prior(scores, targets, f"The config.{PRIOR_CONTRIBUTIONS} of {type(model).__name__}")
    targets = set(targets)
    return {name: score for name, score in scores.items() if name in targets}


def _check_prior(scores: Any, targets: Iterable[str], what: str) -> None:
    """Checks the contributions of a network's own configuration, which messages call `what`."""
    remedy = "pass `contributions` of your own, or beta=0 for uniform ranks"
    try:
        check_scores(scores, remedy)
    except ValueError as error:
        raise ValueError(f"{what} cannot be used. {error}") from error
    missing = [name for name in targets if name not in scores]
    if missing:
        raise ValueError(f"{what} lacks the targeted layer {missing[0]!r}: {remedy}.")
    if not any(scores[name] for name in targets):
        raise ValueError(f"{what} is 0 for every targeted layer: {remedy}.")


def _matched_ranks(patterns: dict[str, int], names: Iterable[str], what: str) -> dict[str, int]:
    """Returns the rank of each layer that a pattern matches, by PEFT's rule for `rank_pattern`: the first counts."""
    names = list(names)
    for pattern in patterns:
        # PEFT gives the name itself back where nothing matches, which a pattern may equal.
        if pattern not in {get_pattern_key([pattern], name) for name in names}:
            raise ValueError(f"The {pattern!r} in `{what}` matches no targeted layer ({names_hint(pattern, names)}).")
    keys = {name: get_pattern_key(list(patterns), name) for name in names}
    return {name: patterns[key] for name, key in keys.items() if key in patterns}


def _targeted_layers(config: CoLoRAConfig, model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Returns the layers that `target_modules` and the fields beside it choose, in network order."""
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        linear = {name for name, layer in layers.items() if isinstance(layer, nn.Linear)}
        chosen = {name: layers[name] for name in layers if name in linear and matches(config, linear, name)}
    elif config.target_modules is not None and not _names_what_ranks_name(config):
        chosen = _matched_layers(config, model, layers)
    elif isinstance(config.ranks, dict):
        check_known_names(config.ranks, layers, "ranks")
        named = set(config.ranks)
        chosen = {name: layer for name, layer in layers.items() if name in named and matches(config, named, name)}
    else:
        # Suffixes, not full names: PEFT applies layers_to_transform to suffixes only.
        suffixes = {name.rpartition(".")[2] for name in layers}
        chosen = {name: layer for name, layer in layers.items() if matches(config, suffixes, name)}
        if config.layers_to_transform is not None:
            chosen = {name: layer for name, layer in chosen.items() if "." in name}
    if not chosen:
        raise ValueError(
            f"Nothing is targeted: target_modules={config.target_modules!r} with "
            f"exclude_modules={config.exclude_modules!r} and layers_to_transform={config.layers_to_transform!r} "
            f"matches no layer of {type(model).__name__}; layers that can be adapted: {some(list(layers), 5)}."
        )
    return chosen


def _names_what_ranks_name(config: CoLoRAConfig) -> bool:
    """Returns whether `target_modules` are full names, those of `ranks` which are not 0, and no suffixes.

    A resolved configuration is saved in this way.
    """
    return isinstance(config.ranks, dict) and config.target_modules == {n for n, rank in config.ranks.items() if rank}


def _matched_layers(config: CoLoRAConfig, model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Returns the layers that `target_modules` matches by PEFT's rules; all must be adaptable."""
    chosen = {}
    wrapped: str | None = None  # prefix of the last adapted layer, whose inside is no target
    for name, module in model.named_modules():
        if not name or (wrapped is not None and name.startswith(wrapped)):
            continue
        if isinstance(module, CoLoRALayer):
            wrapped = f"{name}."
        if not matches(config, config.target_modules, name):
            continue
        if name not in layers:
            reason = why_not_adaptable(module) or "the module around it reads its weight without calling it"
            raise TypeError(
                f"The targeted layer {name!r} is a {type(module).__name__} and cannot be adapted: {reason}. "
                "Narrow target_modules or name it in exclude_modules."
            )
        chosen[name] = layers[name]
    return chosen


def _check_used_once(targets: dict[str, nn.Module], model: nn.Module) -> None:
    """Checks that each target has one place in `model` and a weight that no other module holds.

    PEFT would replace a target in one of its two places only, and merging would write into the weight of another
    module. A block that is registered twice is fine: the layer is replaced inside the block, so for both.
    """
    places: dict[int, list[str]] = defaultdict(list)
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for child_name, child in module._modules.items():
            places[id(child)].append(f"{name}.{child_name}".removeprefix(".").removesuffix(".base_layer"))
        for parameter in module._parameters.values():
            owners[id(parameter)].append(name.removesuffix(".base_layer"))
    for name, layer in targets.items():
        other = next((place for place in places[id(layer)] if place != name), None)
        if other is not None:
            raise ValueError(
                f"The targeted layer {name!r} is also registered as {other!r}, where it would stay without an "
                f"adapter: register it once, or leave {name!r} alone (exclude_modules or rank 0)."
            )
        other = next((owner for owner in owners[id(layer.weight)] if owner != name), None)
        if other is not None:
            raise ValueError(
                f"The targeted layer {name!r} shares its weight with {other!r}, which merging would change, too: "
                "give each a weight of its own, or leave both alone (exclude_modules or rank 0)."
            )


def check_not_compiled(model: nn.Module) -> None:
    """Checks that no part of the network is wrapped by `torch.compile`: its layers would be named after the wrapper.

    An adapter with such names fits no bare network. `Module.compile()` changes no names and may come before.
    """
    for name, module in model.named_modules():
        if "_orig_mod" in module._modules:
            raise ValueError(
                f"{f'The module {name!r}' if name else 'The network'} is compiled, and its adapter would fit no "
                "network that is not: adapt the network first, then compile what get_peft_model or colora_peft.load "
                "returns."
            )


def check_not_offloaded(ranks: dict[str, int], model: nn.Module) -> None:
    """Checks that the weight of every layer with a rank is in memory: PEFT puts the adapter where the weight is."""
    for name, rank in ranks.items():
        if rank and is_offloaded(model.get_submodule(name)):
            raise ValueError(
                f"The targeted layer {name!r} is offloaded (device_map, cpu_offload): adapt the network before you "
                "dispatch it, or leave the layer alone (exclude_modules or rank 0)."
            )


def matches(config: CoLoRAConfig, target_modules: set[str] | str, name: str) -> Any:
    """Applies PEFT's own rule on whether `name` is targeted, with `target_modules` in place of those of `config`."""
    fields = ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "target_parameters")
    view = SimpleNamespace(**{field: getattr(config, field) for field in fields}, target_modules=target_modules)
    return check_target_module_exists(view, name)
