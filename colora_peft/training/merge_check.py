"""Checks that an adapted network computes what its merged network computes.

It does wherever layers are called or their `weight` is read. Networks that write weights themselves, or read them by
other names, train an adapter that does nothing afterwards. Those layers are found here, before the training.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from peft import PeftModel
from torch import Tensor, nn

from colora_peft.inference import evaluation_mode, reconstruct
from colora_peft.tuner import CoLoRAConfig, CoLoRALayer
from colora_peft.utils import some

from .methods import Method, prepare_for_tuning

_RELATIVE_SIZE = 0.1
"""Size of the random deltas of the check, relative to the weights."""

_TOLERANCE = 0.05
"""Largest difference between adapted and merged, relative to what the deltas change."""


def layers_not_as_merged(model: PeftModel, images: Tensor) -> list[str]:
    """Returns the adapted layers whose deltas do something else in `model` than in its merged network.

    It runs the network with random deltas, in training and in evaluation mode; afterwards all is as it was. Where the
    layers are wrong together and right one by one, all are returned.

    Args:
        model: A network with CoLoRA adapters.
        images: A small batch (B, C, H, W) that the network takes, on its device.
    """
    layers = {name: layer for name, layer in model.get_base_model().named_modules() if isinstance(layer, CoLoRALayer)}
    with evaluation_mode(model), _put_back(model, layers), torch.no_grad(), _own_generator(images.device):
        for layer in layers.values():
            _draw_delta(layer)
        if _agrees(model, layers, layers, images):
            return []
        return [name for name in layers if not _agrees(model, layers, {name}, images)] or list(layers)


def leave_wrong_layers_alone(
    model: PeftModel, method: Method, config: CoLoRAConfig, images: Tensor
) -> tuple[PeftModel, list[str]]:
    """Returns the network without adapters on `layers_not_as_merged`, and the names of those layers.

    Args:
        model: Result of `prepare_for_tuning` for this method and configuration.
        method: An adapter method.
        config: The configuration, which names no `exclude_modules`.
        images: A small batch.

    Raises:
        ValueError: All layers are among them.
    """
    left: list[str] = []
    while wrong := layers_not_as_merged(model, images):
        left += wrong
        if len(wrong) == sum(isinstance(module, CoLoRALayer) for module in model.modules()):
            break
        network = model.unload()
        if hasattr(network, "peft_config"):  # PEFT would warn of it
            del network.peft_config
        # Layers that had no rank may get one now, so they are checked next.
        model = prepare_for_tuning(network, method, replace(config, exclude_modules=left))
    else:
        return model, left
    raise ValueError(
        f"The network reads or writes the weights of {some(left, 5)} in a way that no adapter can follow, so the "
        "result would not be what was trained: let it call these layers or read their `weight`, or use --method full."
    )


def _agrees(model: PeftModel, layers: Mapping[str, CoLoRALayer], chosen: Collection[str], images: Tensor) -> bool:
    """Returns whether the network with the deltas of the `chosen` layers alone is that with them merged."""
    for training in (False, True):
        bare = _run(model, layers, (), images, training)
        adapted = _run(model, layers, chosen, images, training)
        merged = _run(model, layers, chosen, images, training, merge=True)
        scale = (merged - bare).norm() * _TOLERANCE + merged.norm() * 1e-5
        if torch.isfinite(merged).all() and not (adapted - merged).norm() <= scale:
            return False
    return True


def _run(
    model: PeftModel,
    layers: Mapping[str, CoLoRALayer],
    chosen: Collection[str],
    images: Tensor,
    training: bool,
    merge: bool = False,
) -> Tensor:
    with _put_back(model, layers):
        for name, layer in layers.items():
            layer._disable_adapters = name not in chosen
            if merge and name in chosen:
                layer.merge()
        torch.manual_seed(0)
        model.train(training)  # also where it is already: some networks compute their weights then
        return reconstruct(model, images).float()


@contextmanager
def _put_back(model: PeftModel, layers: Mapping[str, CoLoRALayer]) -> Iterator[None]:
    """Context after which parameters and buffers are what and where they were, and the same layers are disabled."""
    weights = [(weight, weight.data, weight.data.clone()) for weight in model.parameters()]
    owners = [module._buffers for module in model.modules()]
    buffers = [(owner, key, b, b.clone()) for owner in owners for key, b in owner.items() if b is not None]
    disabled = [layer._disable_adapters for layer in layers.values()]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, data, content in weights:
                weight.data = data
                data.copy_(content)
            for owner, key, buffer, content in buffers:
                owner[key] = buffer.copy_(content)
        for layer, was_disabled in zip(layers.values(), disabled, strict=True):
            layer._disable_adapters = was_disabled
            layer.merged_adapters.clear()
            layer.train(layer.training)  # forgets what it kept


def _draw_delta(layer: CoLoRALayer) -> None:
    """Gives the active adapters of a layer deltas of a size that shows."""
    size = _RELATIVE_SIZE * max(layer.get_base_layer().weight.square().mean().sqrt().item(), 1e-2)
    for adapter in layer.active_adapters:
        parameters = layer.weights_of(adapter)
        for parameter in parameters:
            nn.init.normal_(parameter)
        if parameters:
            parameters[-1].mul_(size / layer.delta_matrix(adapter).square().mean().sqrt().clamp_min(1e-12))


@contextmanager
def _own_generator(device: torch.device) -> Iterator[None]:
    """Context that draws nothing from the generators of the run."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        yield
