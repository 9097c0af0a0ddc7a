"""Means over a whole image, gathered tile by tile, for networks that pool over all they see.

A network such as NAFNet averages its features over the whole image (channel attention). Given a tile it averages
over the tile, so that tiles of one image are restored differently. Here a first pass over the tiles gathers what
each pooling layer sees; the pass that restores them uses the mean over the image in every tile. The method is ours.

In the first pass layers use the mean over the tiles so far, in the second that of the whole first pass, and so on.
Means behind the first pooling layer are therefore near to those of the untiled network, and not equal: after n passes
the first n pooling layers are right up to the tiles' cut edges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from colora_peft.utils import is_compiled, register_for_this_thread

Rectangle = tuple[tuple[int, int], tuple[int, int]]
"""Part of an image: [first, end) of its rows and of its columns."""


def is_global_pool(module: nn.Module) -> bool:
    """Whether it is an `nn.AdaptiveAvgPool2d(1)`."""
    return isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1))


def averages_over_pixels(module: nn.Module) -> bool:
    """Whether its output is a mean over the pixels, the last two dimensions, of its inputs.

    `nn.AdaptiveAvgPool2d(1)` is one. A network that averages something else, such as products of channels, does it in
    a module with `averages_over_pixels = True`, from inputs (B, ..., H, W) of one size.
    """
    return is_global_pool(module) or getattr(module, "averages_over_pixels", False) is True


class ImageStatistics:
    """Means that the averaging layers of a network see in one image; `attached` hooks into the layers."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = [module for module in model.modules() if averages_over_pixels(module)]
        self._network_name = type(model).__name__
        self._compiled = is_compiled(model)
        self._means: list[Tensor] = []  # in the order in which the layers run; a layer may run more than once
        self._sums: list[Tensor] = []
        self._pixels = 0
        self._call = 0
        self._cores: Sequence[Rectangle] | None = None
        self._tile_shape = (0, 0)

    @property
    def needed(self) -> bool:
        """Whether there is any layer that averages."""
        return bool(self._layers)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Context in which the layers return, in this thread, the means of the last finished pass or those so far."""
        handles = [register_for_this_thread(layer.register_forward_hook, self._hook) for layer in self._layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin_batch(self, tile_shape: tuple[int, int], cores: Sequence[Rectangle] | None) -> None:
        """Announces that the next pass of the network is over tiles (B, C, *tile_shape).

        Args:
            tile_shape: Height and width of the tiles.
            cores: Parts of the tiles that count in the means; the cores of all tiles make up the image. None gathers
                nothing.
        """
        self._call, self._tile_shape, self._cores = 0, tile_shape, cores
        if cores is not None:
            self._pixels += sum((bottom - top) * (right - left) for (top, bottom), (left, right) in cores)

    def finish_pass(self) -> None:
        """Puts the means that were gathered since the last pass into use.

        Layers that did not run, such as a head that is left over, are left alone.

        Raises:
            RuntimeError: No layer of a compiled network was seen at work.
        """
        if not self._sums and self._compiled:
            raise RuntimeError(
                f"No pooling layer of {self._network_name} was seen at work, since it is compiled: pass the one that "
                'is not, or pooling="tile".'
            )
        self._means = [total / self._pixels for total in self._sums]
        self._sums, self._pixels = [], 0

    def _hook(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        number = self._call
        self._call += 1
        if self._cores is not None:
            total = self._weighted_sum(layer, inputs, self._cores)
            if number == len(self._sums):
                self._sums.append(total)
            else:
                self._sums[number] += total
        if number < len(self._means):
            mean = self._means[number]
        elif self._cores is not None:
            mean = self._sums[number] / self._pixels
        else:
            return None
        return mean.to(output.dtype).expand_as(output)

    def _weighted_sum(self, layer: nn.Module, inputs: tuple[Any, ...], cores: Sequence[Rectangle]) -> Tensor:
        """Returns (1, ...) float32: the sum over the samples of the core's mean times its number of pixels."""
        height, width = inputs[0].shape[-2:]
        rows_per_pixel, columns_per_pixel = height / self._tile_shape[0], width / self._tile_shape[1]
        total: Tensor | None = None
        for sample, (rows, columns) in enumerate(cores):
            top, bottom = (round(edge * rows_per_pixel) for edge in rows)
            left, right = (round(edge * columns_per_pixel) for edge in columns)
            parts = [each[sample : sample + 1, ..., top:bottom, left:right].float() for each in inputs]
            mean = layer.forward(*parts)  # calling the layer itself would run this hook
            weight = (rows[1] - rows[0]) * (columns[1] - columns[0])
            total = mean * weight if total is None else total + mean * weight
        return total
