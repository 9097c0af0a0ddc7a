"""Local pooling at test time: a network that pools over the whole image pools over windows of the training size.

Chu, Chen, Chen, Lu, "Improving Image Restoration by Revisiting Global Information Aggregation", ECCV 2022, arXiv
2112.04491 (Test-time Local Converter, TLC), written from the paper. A network that is trained on patches and averages
its features over all it sees meets other averages in whole images. With local pooling each pixel gets the mean over a
window around it; near the border, that of the nearest window inside. Running sums cost the same for every window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from colora_peft.utils import alone_with, register_for_this_thread

from .global_pooling import is_global_pool
from .network import evaluation_mode, reconstruct, tile_multiple

_PROBE_PX = 64  # least side of the image that shows at which resolution a layer works


@contextmanager
def local_pooling(model: nn.Module, window: int) -> Iterator[None]:
    """Context in which each `nn.AdaptiveAvgPool2d(1)` returns means over windows, (B, C, H, W), not one mean.

        with local_pooling(model, window=192):
            restored = model(image)

    The network must multiply or add what it has pooled to feature maps, with only 1 x 1 convolutions and activations
    between. A window as large as the image gives exactly the network itself. Layers are watched, not replaced:
    adapters work as usual, and afterwards the network is as before. Meanwhile it pools locally in every thread.

    Args:
        model: The network, bare or with adapters, not compiled.
        window: Side in pixels of the image, rounded up to the network's size multiple; each layer takes the same
            share of its feature map.

    Raises:
        ValueError: The window is not positive; the network runs no such layer, or one at several resolutions; what it
            does with a pooled value is impossible with a map; or local pooling is on already.
    """
    with _hooked(_local_means(model, window), all_threads=True):
        yield


@contextmanager
def local_pooling_of_this_thread(model: nn.Module, window: int) -> Iterator[None]:
    """Context as `local_pooling`, in which calls from other threads go on as before."""
    with _hooked(_local_means(model, window)):
        yield


def pools_locally(model: nn.Module) -> bool:
    """Whether `local_pooling` of the network is on."""
    # As tuples: another thread may add a hook meanwhile.
    hooks = (hook for module in model.modules() for hook in tuple(module._forward_hooks.values()))
    return any(isinstance(hook, LocalMean) for hook in hooks)


def _local_means(model: nn.Module, window: int) -> dict[nn.Module, LocalMean]:
    """Returns the hook of each pooling layer."""
    if window < 1:
        raise ValueError(f"The window of local pooling must be at least 1 pixel, got {window}.")
    if pools_locally(model):
        raise ValueError(f"{type(model).__name__} pools locally already: leave that `local_pooling` first.")
    scales = _pixels_per_feature(model)
    # A network pads images to its size multiple: a window as large as the image must cover the padding, too.
    multiple = tile_multiple(model)
    window = math.ceil(window / multiple) * multiple
    return {
        layer: LocalMean(math.ceil(window / rows), math.ceil(window / cols)) for layer, (rows, cols) in scales.items()
    }


@dataclass(frozen=True)
class LocalMean:
    """Forward hook of a global pooling layer that returns local means."""

    rows: int
    """Height of the window, in pixels of the feature map."""
    columns: int

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        (features,) = inputs
        if self.rows >= features.shape[-2] and self.columns >= features.shape[-1]:
            return output
        return sliding_mean(features, self.rows, self.columns)


def sliding_mean(features: Tensor, rows: int, columns: int) -> Tensor:
    """Returns the mean over the `rows` x `columns` around each pixel, or over the nearest ones that lie inside.

    (B, C, H, W) to the same shape and dtype. A window of even size reaches one pixel further down and right.
    """
    means = _sliding_mean(_sliding_mean(features.float(), rows, -2), columns, -1)
    return means.to(features.dtype)


def _sliding_mean(x: Tensor, window: int, dim: int) -> Tensor:
    size = x.shape[dim]
    window = min(window, size)
    # Sums along one axis at a time: rounding errors stay those of a line, where those of an area would be visible.
    sums = torch.cumsum(x, dim)
    first, later = sums.narrow(dim, window - 1, 1), sums.narrow(dim, window, size - window)
    means = torch.cat([first, later - sums.narrow(dim, 0, size - window)], dim).div_(window)
    nearest = torch.arange(size, device=x.device).sub_((window - 1) // 2).clamp_(0, size - window)
    return means.index_select(dim, nearest)


@torch.no_grad()
def _pixels_per_feature(model: nn.Module) -> dict[nn.Module, tuple[float, float]]:
    """Returns, for each global pooling layer that runs, the rows and columns of the image per one of its map."""
    scales: dict[nn.Module, tuple[float, float]] = {}
    names = {module: name for name, module in model.named_modules() if is_global_pool(module)}
    probe = _probe(model)

    def measure(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        scale = tuple(probe.shape[dim] / inputs[0].shape[dim] for dim in (-2, -1))
        if scales.setdefault(layer, scale) != scale:
            raise ValueError(
                f"The pooling layer {names[layer]} runs at several resolutions, and no one window fits it: give "
                "each resolution a layer of its own."
            )
        return inputs[0]  # a map in place of one mean, as local pooling gives

    try:
        with alone_with(model), evaluation_mode(model), _hooked(dict.fromkeys(names, measure)):
            reconstruct(model, probe)
    except RuntimeError as error:
        raise ValueError(
            f"{type(model).__name__} cannot use a map of local means where it uses one mean ({error}): local pooling "
            "needs networks that multiply or add what they have pooled to feature maps."
        ) from error
    if not scales:
        raise ValueError(
            f"{type(model).__name__} runs no nn.AdaptiveAvgPool2d(1), or is compiled: there is nothing to make local."
        )
    return scales


def _probe(model: nn.Module) -> Tensor:
    """Returns a black image (1, C, S, S), S a multiple of the network's size multiple."""
    multiple = tile_multiple(model)
    channels = getattr(getattr(model, "config", None), "num_channels", 3)
    side = math.ceil(_PROBE_PX / multiple) * multiple
    parameter = next((each for each in model.parameters() if each.is_floating_point()), torch.empty(0))
    return torch.zeros(1, channels, side, side, device=parameter.device, dtype=parameter.dtype)


@contextmanager
def _hooked(hooks: Mapping[nn.Module, Any], all_threads: bool = False) -> Iterator[None]:
    """Context in which the hooks act on calls from this thread, or from all."""
    with ExitStack() as stack:
        for module, hook in hooks.items():
            register = module.register_forward_hook
            handle = register(hook) if all_threads else register_for_this_thread(register, hook)
            stack.callback(handle.remove)
        yield
