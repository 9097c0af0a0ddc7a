"""The fingerprint of a base: it says which weights an adapter was trained on, and is kept in the configuration.

Two networks of one architecture take each other's adapters without a complaint, and then give wrong images. The
fingerprint tells them apart. It is ours: PEFT stores a name alone, which says nothing about the weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from colora_peft.utils import digest_of_weights

from .offloading import is_offloaded

if TYPE_CHECKING:
    from .config import CoLoRAConfig

SCHEME = "sha256-float32"
"""Name of the way of counting. Fingerprints of other schemes cannot be compared with."""

_WRAPPERS = (".base_layer.", ".original_module.")  # what PEFT puts between a module and its own weights
_COPIES = "modules_to_save"  # PEFT's trained copies of whole modules
_SHELLS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # compiled, checkpointed


def base_fingerprint(model: nn.Module) -> str | None:
    """Returns a fingerprint of the weights of a network, without the adapters that it may carry.

    It covers the names, shapes and float32 values of the parameters, in the order of their names. Buffers are left
    out, because some change whenever the network runs. It is the same before and after adapters are
    put on, in any memory format and on any device. (examples/experiments/storage/loading.py measures its time.)

    Args:
        model: The network itself, without what `get_peft_model` puts around it.

    Returns:
        "sha256-float32:" and 64 hexadecimal digits; None where the network does not hold all of its weights in
        float32: offloaded, sharded, quantised and half precision weights would give another fingerprint than the same
        network in full.

    Raises:
        ValueError: An adapter is merged into the weights.
    """
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise ValueError(
                f"An adapter is merged into layer {name!r}, so the weights are not those of the base: call "
                "unmerge_adapter() first."
            )
    weights = dict(_base_weights(model))
    if not weights or not all(_is_whole(name, weight) for name, weight in weights.items()):
        return None
    if any(is_offloaded(module) for module in model.modules()):
        return None
    return f"{SCHEME}:{digest_of_weights(weights)}"


def is_other_base(adapter: str | None, base: str | None) -> bool:
    """Returns whether two fingerprints are certainly of different weights: both known, and made in the same way."""
    if adapter is None or base is None:
        return False
    return adapter != base and adapter.startswith(f"{SCHEME}:") and base.startswith(f"{SCHEME}:")


def note_base(config: CoLoRAConfig, adapter_name: str, model: nn.Module, fingerprint: str | None) -> None:
    """Writes into the configuration of a new adapter which base it is for; warns where a given one is for another.

    It only warns: PEFT checks no bases, and to train on from the adapter of another base may be intended.
    `colora_peft.load` refuses. The note is made when the adapter is put on, not when it is saved: training biases
    changes the base.
    """
    if is_other_base(config.base_fingerprint, fingerprint):
        warnings.warn(
            f"Adapter {adapter_name!r} was made for another network than this one: the weights of its base "
            f"({config.base_model_name_or_path}) differ, so do the results.",
            stacklevel=2,
        )
    if not config.inference_mode:
        config.base_fingerprint = fingerprint
        if config.revision is None:  # transformers remembers the commit of what came from the Hub
            config.revision = getattr(getattr(model, "config", None), "_commit_hash", None)


def _base_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields the parameters of the network itself, under the names that they have without adapters."""
    # The adapters of any method that PEFT knows, by the layers that hold them.
    added = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
        for attribute in module.adapter_layer_names
        if isinstance(getattr(module, attribute, None), nn.Module)
        for parameter in getattr(module, attribute).parameters()
    }
    for name, weight in model.named_parameters():
        if id(weight) in added or _COPIES in name.split("."):
            continue
        for shell in _SHELLS:
            name = name.replace(shell, "")
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, ".")
        yield name, weight


def _is_whole(name: str, weight: Tensor) -> bool:
    """Returns whether all values are there in float32; FSDP and DeepSpeed keep the names of what is elsewhere."""
    is_sharded = "_fsdp_wrapped_module." in name or hasattr(weight, "ds_id")
    return type(weight) is nn.Parameter and weight.dtype == torch.float32 and not weight.is_meta and not is_sharded
