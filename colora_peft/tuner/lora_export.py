"""Export of a CoLoRA adapter to a stock LoRA adapter, which plain PEFT loads without this package.

PEFT runs LoRA as a second branch beside the layer, y = layer(x) + scaling * B(A(x)). This is the same map as a delta
on the weight for a Linear layer, and for a convolution whose A pads, strides and groups as the layer itself. There A
(r, k) becomes the convolution (r, in, *kernel), and B (d, r) the convolution (d, r, 1, ...) after it. `lora_obstacle`
names the other cases; it was read from, and tried with, PEFT 0.18 and 0.21. The export is exact up to rounding. PEFT's
own `peft.convert_to_lora` approximates the deltas of Linear layers by an SVD of a given rank.

PEFT sets one limit: it cannot merge LoRA into a Conv3d whose kernel is 1 x 1 in depth and height. Such a layer is
exported and runs, but `merge_and_unload` of the LoRA adapter raises an error.
"""

import copy
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from colora_peft.utils import unwrapped, writing_folder

from .config import CoLoRAConfig
from .layer import CoLoRALayer
from .offloading import check_nothing_offloaded

_LORA_KINDS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LORA_BIAS = {"none": "none", "all": "all", "colora_only": "lora_only"}


def save_as_lora(
    path: str | Path, model: nn.Module, adapter_name: str = "default", merged_base: str | Path | None = None
) -> LoraConfig:
    """Writes adapter `adapter_name` as a LoRA adapter into the folder `path` and returns its configuration.

    `PeftModel.from_pretrained(bare_network, path)` then gives the output of the adapted network, without this package.
    Layers that have no adapter get none. Everything is checked and computed before the first file is written, and the
    files appear whole. `model` is only read; of its weights just the adapter and the merged layers are copied.

    Args:
        path: Folder for adapter_config.json and adapter_model.safetensors. Files of these names are replaced, others
            stay.
        model: The PeftModel, or a network that adapters were injected into.
        adapter_name: Name of the adapter to export; other adapters play no part.
        merged_base: Folder for a copy of the base network. Merged into it are the deltas of the layers that LoRA
            cannot express. The network's own `save_pretrained` writes it, or else its state dict goes to
            `model.safetensors`. The exported adapter then holds the other layers and belongs to this base alone.

    Raises:
        TypeError: `model` carries no PEFT adapters.
        ValueError: The adapter is unknown or not CoLoRA's, adapters are merged, the network is offloaded, a folder
            cannot serve, LoRA cannot express some layers and `merged_base` is None, or it can express none.
    """
    network, config = _network_and_config(model, adapter_name)
    check_nothing_offloaded(network, "save_as_lora")
    _check_folders(path, merged_base, config.base_model_name_or_path)
    layers = _adapted_layers(network, adapter_name)
    obstacles = {name: reason for name, layer in layers.items() if (reason := lora_obstacle(layer)) is not None}
    _check_obstacles(obstacles, len(layers), adapter_name, merged_base is not None)

    with torch.no_grad():
        factors = {name: _lora_factors(layers[name], adapter_name) for name in layers if name not in obstacles}
        tensors = _adapter_tensors(network, config, adapter_name, factors)
        lora_config = _lora_config(config, {name: down.shape[0] for name, (down, _) in factors.items()})
        if merged_base is None:
            _write_adapter(path, lora_config, tensors)
            return lora_config
        base = _bare_network(network)
        for name in obstacles:
            base_layer = base.get_submodule(name)
            base_layer.weight = nn.Parameter(base_layer.weight + layers[name].get_delta_weight(adapter_name))
    lora_config.base_model_name_or_path, lora_config.revision = str(merged_base), None
    with writing_folder(merged_base, keep_others=True) as folder:
        _write_base(folder, base)
        _write_adapter(path, lora_config, tensors)
    return lora_config


def lora_obstacle(layer: nn.Module) -> str | None:
    """Returns None for a layer whose delta stock LoRA can express, else the reason as the end of a sentence.

    PEFT builds A with the kernel, stride and padding of the layer and with nothing else of it.
    """
    layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    kind = next((kind for kind in _LORA_KINDS if isinstance(layer, kind)), None)
    if kind is None:
        return f"it is a {type(layer).__name__}, and LoRA adapts {', '.join(kind.__name__ for kind in _LORA_KINDS)}"
    # Of a subclass of a convolution, PEFT calls the constructor and the forward pass for A and B, too.
    methods = ("forward",) if kind is nn.Linear else ("forward", "_conv_forward", "__init__")
    for method in methods:
        if getattr(type(layer), method) is not getattr(kind, method):
            return f"its class {type(layer).__name__} has its own `{method}`, which LoRA's branch does not follow"
    if kind is nn.Linear:
        return None
    if layer.groups != 1:
        return f"it has {layer.groups} groups, and LoRA's down convolution has one"
    if any(step != 1 and size != 1 for step, size in zip(layer.dilation, layer.kernel_size, strict=True)):
        return f"it has the dilation {layer.dilation}, and LoRA's convolutions have none"
    if layer.padding_mode != "zeros" and any(layer._reversed_padding_repeated_twice):
        return f"it pads by {layer.padding_mode!r}, and LoRA's convolutions pad with zeros"
    return None


def _network_and_config(model: nn.Module, adapter_name: str) -> tuple[nn.Module, CoLoRAConfig]:
    """Returns the network without what PEFT and torch.compile put around it, and the adapter's configuration."""
    model = unwrapped(model)
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        raise TypeError(
            f"A {type(model).__name__} carries no PEFT adapters: pass what get_peft_model or "
            "PeftModel.from_pretrained returned, unwrapped (accelerator.unwrap_model)."
        )
    if not isinstance(configs.get(adapter_name), CoLoRAConfig):
        known = ", ".join(repr(name) for name, config in configs.items() if isinstance(config, CoLoRAConfig))
        raise ValueError(f"The model has no CoLoRA adapter {adapter_name!r}: choose one of {known or 'none'}.")
    tuner = model.base_model if isinstance(model, PeftModel) else model
    return tuner.model if isinstance(tuner, BaseTuner) else tuner, configs[adapter_name]


def _check_folders(path: str | Path, merged_base: str | Path | None, original_base: str | None) -> None:
    """Checks that no folder is a file, and that `merged_base` replaces neither the adapter nor the original base."""
    for folder in filter(None, (path, merged_base)):
        if Path(folder).is_file():
            raise ValueError(f"The path {str(folder)!r} is a file: choose a folder.")
    for taken, owner in ((path, "adapter"), (original_base, "original base")):
        if merged_base and taken and Path(merged_base).resolve() == Path(taken).resolve():
            raise ValueError(f"The merged base cannot share {str(taken)!r} with the {owner}: choose another folder.")


def _modules(network: nn.Module, adapter_name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yields modules by their names in the bare network, each once.

    Adapted layers, and modules that the adapter trains whole, come as one. A module that another adapter trains whole
    (its `modules_to_save`) comes as it was before.
    """
    seen: set[int] = set()

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if isinstance(module, ModulesToSaveWrapper) and adapter_name not in module.modules_to_save:
            module = module.original_module
        if id(module) in seen:
            return
        seen.add(id(module))
        yield name, module
        if not isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
            for child_name, child in module.named_children():
                yield from walk(f"{name}.{child_name}".removeprefix("."), child)

    return walk("", network)


def _adapted_layers(network: nn.Module, adapter_name: str) -> dict[str, CoLoRALayer]:
    """Returns the layers that have the adapter, by their names in the bare network; nothing may be merged."""
    layers = {}
    for name, module in _modules(network, adapter_name):
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise ValueError(
                f"The adapter {module.merged_adapters[0]!r} is merged into layer {name!r}: call unmerge_adapter first."
            )
        if isinstance(module, CoLoRALayer) and adapter_name in module.scaling:
            layers[name] = module
    return layers


def _check_obstacles(obstacles: dict[str, str], layer_count: int, adapter_name: str, may_merge: bool) -> None:
    """Checks that LoRA can express the adapter, or the part of it that is not merged into the base."""
    if len(obstacles) == layer_count:
        remedy = "save the network that merge_and_unload returns instead"
    elif obstacles and not may_merge:
        remedy = "pass merged_base=<folder> to merge them into a copy of the base network"
    else:
        return
    reasons = "; ".join(f"{name!r}: {reason}" for name, reason in obstacles.items())
    count = f"{len(obstacles)} of the {layer_count} layers"
    raise ValueError(f"LoRA cannot express {count} of adapter {adapter_name!r}, so {remedy} ({reasons}).")


def _lora_factors(layer: CoLoRALayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    """Returns A (r, in, *kernel) and B (d, r, 1, ...) with B A = delta_W, in at least float32.

    One factor of a dense delta is the identity. The factors include the scaling, because PEFT has one gain for all
    layers and divides it by the rank.
    """
    dense = adapter_name in layer.colora_dense
    matrix = layer.colora_dense[adapter_name] if dense else layer.colora_B[adapter_name]
    up = layer.scaling[adapter_name] * matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    if dense:
        identity = torch.eye(min(up.shape), dtype=up.dtype, device=up.device)
        down, up = (up, identity) if up.shape[0] <= up.shape[1] else (identity, up)
    else:
        down = layer.colora_A[adapter_name].to(up.dtype)
    weight = layer.get_base_layer().weight
    return down.reshape(-1, *weight.shape[1:]), up.reshape(*up.shape, *[1] * (weight.dim() - 2))


def _adapter_tensors(
    network: nn.Module, config: CoLoRAConfig, adapter_name: str, factors: dict[str, tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Returns the content of adapter_model.safetensors, under the keys that PEFT loads LoRA from."""
    tensors = {}
    for name, (down, up) in factors.items():
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    for name, module in _modules(network, adapter_name):
        if isinstance(module, ModulesToSaveWrapper):
            saved = _bare_network(module.modules_to_save[adapter_name]).state_dict()
            tensors |= {f"{name}.{key}": tensor for key, tensor in saved.items()}
        elif config.bias == "all" or (config.bias == "colora_only" and isinstance(module, CoLoRALayer)):
            # LoRA, too, has the bias of a layer that it adapts one level down; any other is where it always was.
            key = f"{name}.base_layer.bias" if name in factors else f"{name}.bias".removeprefix(".")
            owner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            if owner._parameters.get("bias") is not None:
                tensors[key] = owner.bias
    return _separate({f"base_model.model.{key}": tensor for key, tensor in tensors.items()})


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors as safetensors takes them: contiguous, and none on the storage of another."""
    separate, storages = {}, set()
    for key, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        separate[key] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return separate


def _lora_config(config: CoLoRAConfig, ranks: dict[str, int]) -> LoraConfig:
    """Returns the LoRA configuration that targets exactly the layers of `ranks`, each with its rank and a gain of 1.

    PEFT would find the name "conv" in "blocks.0.conv" as well. A string in target_modules is matched against the
    whole name; the keys of rank_pattern are searched at its end, where only "^" keeps them from matching later parts.
    """
    common = Counter(ranks.values()).most_common(1)[0][0]
    # One key a rank, not a layer: PEFT tries all keys for each layer, and Python caches only 512 compiled expressions.
    others = {rank: [name for name in ranks if ranks[name] == rank] for rank in set(ranks.values()) - {common}}
    pattern = {"^" + _any_of(names): rank for rank, names in sorted(others.items())}
    return LoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
        r=common,
        lora_alpha=common,
        target_modules=_any_of(list(ranks)),
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        bias=_LORA_BIAS[config.bias],
        modules_to_save=config.modules_to_save,
    )


def _any_of(names: list[str]) -> str:
    """Returns a regular expression for these names and no other, however it is anchored."""
    return f"(?:{'|'.join(map(re.escape, names))})"


def _bare_network(network: nn.Module) -> nn.Module:
    """Returns the network as it was before PEFT: its modules are new, its parameters and buffers are the same."""
    shared = {id(tensor): tensor for tensor in [*network.parameters(), *network.buffers()]}
    bare = copy.deepcopy(network, shared)
    _unwrap_children(bare)
    # Notes of PEFT and transformers on the network: with them, save_pretrained would write the adapter instead.
    bare.__dict__.pop("peft_config", None)
    bare.__dict__.pop("_hf_peft_config_loaded", None)
    return bare


def _unwrap_children(module: nn.Module) -> None:
    """Puts the layers that PEFT wrapped back in their places."""
    for name, child in module._modules.items():
        if isinstance(child, AuxiliaryTrainingWrapper):
            child = child.original_module
        if isinstance(child, BaseTunerLayer):
            child = child.get_base_layer()
        module._modules[name] = child
        if child is not None:
            _unwrap_children(child)


def _write_adapter(path: str | Path, config: LoraConfig, tensors: dict[str, Tensor]) -> None:
    with writing_folder(path, keep_others=True) as folder:
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(folder))


def _write_base(folder: Path, base: nn.Module) -> None:
    if hasattr(base, "save_pretrained"):
        base.save_pretrained(str(folder))
    else:
        save_file(_separate(base.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
