"""Another adapter in a network that was compiled, without compiling it again.

`prepare_model_for_compiled_hotswap` gives every layer a buffer with the effective weight, and what is then compiled
for evaluation reads that alone. Adapters of any ranks, on any layers, differ only in the content of those buffers.
Nothing is padded, and the compiled network does what the bare one does. The price is a second copy of the adaptable
weights. The names are those of `peft.utils.hotswap`, which serves LoRA.
"""

import os
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import load_peft_weights
from torch import Tensor

from colora_peft.ranks import adaptable_layers
from colora_peft.utils import is_compiled, some, unwrapped

from .config import CoLoRAConfig
from .deltas import delta_shapes
from .fingerprint import note_base
from .layer import CoLoRALayer, adapted_layers
from .load_checks import check_adapter_weights, check_unmerged, weights_by_adapter
from .model import CoLoRAModel, tuner_of
from .offloading import check_nothing_offloaded
from .peft_internals import replace_layer
from .targets import resolve_ranks


def prepare_model_for_compiled_hotswap(model: PeftModel) -> None:
    """Lets `model` be compiled for inference once, whatever adapters come later.

    After it, `torch.compile(model)` survives `hotswap_adapter`, merging, and a layer's `set_scale`. PeftModel's own
    forward pass depends on the name of the active adapter. `torch.compile(model.get_base_model())` does not, and
    survives `set_adapter` and `disable_adapter()` as well. Code that is not compiled runs as before, and so does
    training. Compiled code in evaluation mode gives no adapter a gradient. It sees weights that were written by hand
    or by an optimizer at the next `model.eval()`.

    Raises:
        TypeError: `model` is not a PeftModel with CoLoRA adapters.
        ValueError: It is compiled already, is offloaded, or an adapter trains biases.
    """
    if is_compiled(model):
        raise ValueError("The model is compiled already: prepare it for hot-swapping before torch.compile.")
    tuner = tuner_of(model)
    check_nothing_offloaded(model, "prepare_model_for_compiled_hotswap")
    with_biases = [name for name, config in tuner.peft_config.items() if config.bias != "none"]
    if with_biases:
        raise ValueError(
            f"Adapter {some(with_biases)} trains biases, which are stored under other names in a prepared network: "
            "hot-swapping is for adapters with bias='none'."
        )
    adapted = adapted_layers(tuner.model)
    disabled = any(layer.disable_adapters for layer in adapted.values())
    for name, layer in adaptable_layers(tuner.model).items():
        if name not in adapted:
            wrapped = CoLoRALayer(layer).train(layer.training)
            wrapped.set_adapter(tuner.active_adapters)
            wrapped.enable_adapters(not disabled)
            parent, _, own_name = name.rpartition(".")
            replace_layer(tuner, tuner.model.get_submodule(parent), own_name, wrapped, layer)
    for layer in adapted_layers(tuner.model).values():
        layer.pin_weight()


def hotswap_adapter(
    model: PeftModel, model_id: str | os.PathLike, adapter_name: str = "default", **hub_options: Any
) -> None:
    """Puts the adapter of `model_id` in the place of `adapter_name`, whatever their ranks and layers.

    Everything is read and checked before the first layer is changed.

    Args:
        model: A PeftModel, compiled or not.
        model_id: Folder of an adapter, or its name on the Hub.
        adapter_name: Adapter to replace; the new one takes over its name and whether it is active, and is frozen.
        hub_options: `revision`, `subfolder`, `token`, `cache_dir`, ... as in `PeftModel.from_pretrained`.

    Raises:
        TypeError: `model` is not a PeftModel with CoLoRA adapters, or the new adapter is of another method.
        ValueError: There is no such adapter, it is merged, one of the two trains more than deltas, the new one does
            not fit the network, or the network is offloaded.

    Warns:
        UserWarning: The new adapter was trained on another network than this one.
    """
    tuner = tuner_of(unwrapped(model))
    check_nothing_offloaded(tuner.model, "hotswap_adapter")
    config = PeftConfig.from_pretrained(os.fspath(model_id), **hub_options)
    if not isinstance(config, CoLoRAConfig):
        raise TypeError(f"The adapter {str(model_id)!r} is of type {config.peft_type}: hotswap_adapter swaps CoLoRA.")
    _check_swap(tuner, adapter_name, config)
    config.ranks = resolve_ranks(config, tuner.model)
    ranks = {name: rank for name, rank in config.ranks.items() if rank}
    layers = adapted_layers(tuner.model)
    lacking = [name for name in ranks if name not in layers]
    if lacking:
        raise ValueError(
            f"The new adapter also adapts {some(lacking, 5)}, which {adapter_name!r} leaves alone: call "
            "prepare_model_for_compiled_hotswap(model) once before, and before torch.compile."
        )
    weights = load_peft_weights(os.fspath(model_id), device="cpu", **hub_options)
    named = {f"{key}.{adapter_name}": tensor for key, tensor in weights.items()}
    found = weights_by_adapter(named, "base_model.model.", tuner.prefix).get(adapter_name, {})
    shapes = {name: delta_shapes(layers[name].matrix_shape, rank) for name, rank in ranks.items()}
    expected = {
        f"{name}.{parameter}": torch.empty(shape, device="meta")
        for name, own in shapes.items()
        for parameter, shape in own.items()
    }
    check_adapter_weights(expected, found, adapter_name)
    config.inference_mode = True
    note_base(config, adapter_name, tuner.model, tuner.fingerprint_of_base())
    for name, layer in layers.items():
        if name not in ranks:
            layer.remove_adapter(adapter_name)
            continue
        device = layer.get_base_layer().weight.device
        own = {parameter: _as_loaded(found[f"{name}.{parameter}"], device) for parameter in shapes[name]}
        layer.place_adapter(adapter_name, ranks[name], config.colora_alpha, own, config.method_version)
        layer.set_requires_grad(adapter_name, False)
    tuner.peft_config[adapter_name] = config


def _check_swap(tuner: CoLoRAModel, adapter_name: str, new: CoLoRAConfig) -> None:
    if adapter_name not in tuner.peft_config:
        raise ValueError(f"There is no adapter {adapter_name!r} to replace, only {some(sorted(tuner.peft_config))}.")
    check_unmerged(tuner, adapter_name)
    for which, config in (("old", tuner.peft_config[adapter_name]), ("new", new)):
        if config.modules_to_save or config.bias != "none":
            raise ValueError(
                f"The {which} adapter trains whole modules or biases (modules_to_save, bias), which cannot be "
                "swapped: use load_adapter and set_adapter."
            )


def _as_loaded(weight: Tensor, device: torch.device) -> Tensor:
    """Returns a copy on `device`, in float32 where the file has 16 bits, as PEFT loads adapters."""
    half = weight.dtype in (torch.float16, torch.bfloat16)
    return weight.to(device, torch.float32 if half else weight.dtype, copy=True)
