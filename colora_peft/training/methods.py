"""Methods to adapt a pre-trained network, as `examples/finetune.py` offers them: CoLoRA and its peers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal, get_args

from peft import PeftModel, get_peft_model
from torch import nn

from colora_peft.ranks import adaptable_layers, common_rank, weight_matrix_shape
from colora_peft.tuner import CoLoRAConfig, resolve_ranks

Method = Literal["colora", "lora", "full", "decoder", "bias"]
METHODS: tuple[str, ...] = get_args(Method)
ADAPTER_METHODS: tuple[Method, ...] = ("colora", "lora")
"""Methods that leave the network as it is, and save an adapter alone."""

# Peak learning rates: the best of grids on training pairs. colora and lora: of underwater, noise and rain (the middle
# of three at 7%, examples/experiments/contributions); full: of ten tasks (examples/experiments/methods/defaults);
# decoder and bias: of underwater (examples/experiments/learning_rates).
LEARNING_RATES: Mapping[str, float] = {"colora": 2e-3, "lora": 2e-3, "full": 1e-3, "decoder": 3e-3, "bias": 1e-2}

# nn.MultiheadAttention calls one of its biases by the second name.
_BIASES = ("bias", "in_proj_bias")


def prepare_for_tuning(model: nn.Module, method: Method, config: CoLoRAConfig) -> nn.Module:
    """Makes exactly those parameters of `model` trainable that the method trains.

    Args:
        model: The pre-trained network.
        method: "colora" adapters by contribution; "lora" adapters of one rank for every layer, as PEFT's LoRA has it,
            the highest that the same budget allows; "full" everything; "decoder" the modules that the network's class
            lists in `decoder_modules`; "bias" every bias.
        config: Budget and contributions of "colora"; "lora" takes its budget and targets, the others ignore it. It is
            not changed.

    Returns:
        A `PeftModel` for the adapter methods, else the network itself.

    Raises:
        ValueError: if the method is unknown, the network has no such parameters, or the budget does not pay for
            rank 1 in every layer ("lora").
    """
    if method == "colora":
        return get_peft_model(model, replace(config))  # PEFT writes into the configuration it is given
    if method == "lora":
        return get_peft_model(model, _same_rank(model, config))
    if method == "full":
        return _train_only(model, method, lambda name: True)
    if method == "bias":
        return _train_only(model, method, lambda name: name.rpartition(".")[2] in _BIASES)
    if method == "decoder":
        decoder = tuple(f"{module}." for module in getattr(model, "decoder_modules", ()))
        if not decoder:
            raise ValueError(
                f"{type(model).__name__} does not say which of its modules are the decoder; give its class the "
                "attribute `decoder_modules` or choose another --method."
            )
        return _train_only(model, method, lambda name: name.startswith(decoder))
    raise ValueError(f"The method is {method!r}; choose one of {', '.join(METHODS)}.")


def check_can_be_saved(model: nn.Module, method: Method, name_or_path: str) -> None:
    """Refuses, before any work, to tune a network itself that has no way to be saved: adapters are PEFT's to save."""
    if method not in ADAPTER_METHODS and not hasattr(model, "save_pretrained"):
        raise ValueError(
            f"--method {method} saves the network by its save_pretrained, which {type(model).__name__} of "
            f"{name_or_path} does not have: choose --method colora or lora."
        )


def _same_rank(model: nn.Module, config: CoLoRAConfig) -> CoLoRAConfig:
    targeted = resolve_ranks(replace(config, ranks=1, min_rank_pattern={}, max_rank_pattern={}), model)
    rank = common_rank([weight_matrix_shape(model.get_submodule(name)) for name in targeted], config.parameter_budget)
    return replace(config, ranks=rank, contributions=None, min_rank_pattern={}, max_rank_pattern={})


def _train_only(model: nn.Module, method: str, is_trained: Callable[[str], bool]) -> nn.Module:
    trained = {name for name, _ in model.named_parameters() if is_trained(name)}
    if not trained:
        raise ValueError(f"{type(model).__name__} has no parameters that --method {method} trains.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model


def trained_parameters(model: nn.Module) -> dict[str, float]:
    """Number of `trainable_parameters` of a network, and two ratios.

    `trainable_ratio` is their share of the weights of all layers that can be adapted, which a budget limits; it
    exceeds 1 where norms and biases are trained, too. `trainable_ratio_of_model` is their share of all parameters.
    """
    network = model.get_base_model() if isinstance(model, PeftModel) else model
    weights = sum(layer.weight.numel() for layer in adaptable_layers(network).values())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    prefix = model.base_model.prefix if isinstance(model, PeftModel) else None
    everything = sum(p.numel() for name, p in model.named_parameters() if not prefix or not _is_added(name, prefix))
    return {
        "trainable_parameters": trained,
        "trainable_ratio": trained / weights,
        "trainable_ratio_of_model": trained / everything,
    }


def _is_added(name: str, prefix: str) -> bool:
    """Whether a parameter is an adapter's, or belongs to PEFT's copy of a module that it trains whole."""
    return any(part.startswith(prefix) or part == "modules_to_save" for part in name.split("."))
