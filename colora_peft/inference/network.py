"""Contract of a restoration network: what goes in, what comes out, its loss and the multiples of its sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from colora_peft.utils import pad_to_multiple, unwrapped


def reconstruct(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Returns the restored images (B, C, H, W) of any network that gives a tensor or the field `reconstruction`.

    Where the network runs on heights and widths of some multiple only (`needed_multiple`), the images are padded
    before and cropped after.

    Raises:
        TypeError: The network returns something else.
        ValueError: The restored images do not have the shape of the input.
    """
    padded = pad_to_multiple(pixel_values, needed_multiple(model))
    reconstruction = output_images(model, model(padded))
    if reconstruction.shape != padded.shape:
        raise ValueError(
            f"{type(model).__name__} returned images of shape {tuple(reconstruction.shape)} for inputs of shape "
            f"{tuple(padded.shape)}; a restoration network must keep the shape.{_hint(reconstruction, padded)}"
        )
    height, width = pixel_values.shape[-2:]
    return reconstruction[..., :height, :width]


def output_images(model: nn.Module, output: Any) -> Tensor:
    """Returns the images in what `model` returned: a tensor, or the field `reconstruction`.

    Raises:
        TypeError: It is neither.
    """
    images = output if isinstance(output, Tensor) else getattr(output, "reconstruction", None)
    if not isinstance(images, Tensor):
        raise TypeError(
            f"{type(model).__name__} returned {type(output).__name__}; a restoration network must return the restored "
            "images as a tensor or as an output with the field `reconstruction`."
        )
    return images


def _hint(reconstruction: Tensor, images: Tensor) -> str:
    """A sentence for networks that need a multiple or enlarge, the likeliest of those that change the shape."""
    factors = [new / old for new, old in zip(reconstruction.shape[-2:], images.shape[-2:], strict=True)]
    if factors != [1.0, 1.0] and all(0.5 < factor < 2 for factor in factors):
        return " If its sides must be multiples of some number, set it as the network's attribute `needs_multiple_of`."
    if factors[0] != factors[1] or factors[0] <= 1:
        return ""
    return (
        f" It enlarges {factors[0]:g} times: use the variant for restoration (for Swin2SR `upscale=1`), or train this "
        "one with a loss of your own, as get_peft_model adapts any network."
    )


def restoration_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean absolute error between the restored `pixel_values` and `labels`.

    The contribution scores are of this loss. The scripts train on it, and on the term of `--checkerboard_weight`.

    Raises:
        TypeError, ValueError: as `reconstruct`; or labels and restored images differ in shape.
    """
    restored, labels = reconstruct(model, batch["pixel_values"]), batch["labels"]
    if labels.shape != restored.shape:  # PyTorch would repeat one for the other, with a warning at most
        raise ValueError(
            f"The labels must have the shape of the restored images {tuple(restored.shape)}, got "
            f"{tuple(labels.shape)}."
        )
    return F.l1_loss(restored, labels)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context in which the model is in evaluation mode; afterwards every module has its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:  # parents first: `train` sets the children too, who then get their own
            if module.training != training:
                module.train(training)


# --------------------------------------------------------------------------------------------- multiples and padding


def needed_multiple(model: nn.Module) -> int:
    """Returns what the height and width of the images that `model` takes must be multiples of; 1 if any will do.

    The network says it in its attribute `needs_multiple_of` (`size_multiple` in earlier versions), which whoever
    loads a network may set. The Swin2SR of transformers needs no attribute: it is the side of its windows.
    """
    network = unwrapped(model)
    config = getattr(network, "config", None)
    windows = config.window_size if getattr(config, "model_type", None) == "swin2sr" else 1
    return getattr(network, "needs_multiple_of", getattr(network, "size_multiple", windows))


def tile_multiple(model: nn.Module) -> int:
    """Returns what the sides of tiles must be multiples of, for every level of the network to be cut alike.

    It covers `needed_multiple`, and `config.pads_to_multiple` (`size_multiple` in earlier versions), to which a
    network pads images by itself.
    """
    config = getattr(model, "config", None)
    padded = getattr(config, "pads_to_multiple", getattr(config, "size_multiple", 1))
    return math.lcm(padded, needed_multiple(model))
