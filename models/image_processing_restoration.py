"""Image processor of the backbones: images as people hold them to `pixel_values`, and the restored ones back.

Pixels are neither resized, normalised nor padded: a backbone takes RGB in [0, 1] of any size and pads by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import ModelOutput, TensorType

ImageLike = Image.Image | np.ndarray | Tensor

_CHANNELS = (1, 3, 4)
"""Numbers of channels that an array may have: grey, RGB, or RGB with opacity."""

_LARGEST_FLOAT = 2.0
"""Largest value of a float image. Noise may lead above 1; images in [0, 255] lie far above."""


class RestorationImageProcessor(BaseImageProcessor):
    """Turns images into the `pixel_values` of a restoration network, and its output into images."""

    model_input_names = ["pixel_values"]

    def preprocess(
        self, images: ImageLike | Sequence[ImageLike], return_tensors: str | TensorType | None = "pt"
    ) -> BatchFeature:
        """Converts one image or a batch of images of one size.

        The EXIF orientation is applied, grey becomes RGB and transparency is laid on white, as
        `colora_peft.images.read_image` does.

        Args:
            images: One image or a list. A Pillow image; a NumPy array (H, W) or (H, W, C); or a tensor (H, W) or
                (C, H, W), with 1, 3 or 4 channels. Arrays and tensors may be batches, with one axis more in front.
                They hold uint8, uint16, or floats in [0, 1].
            return_tensors: "pt" for a tensor, "np" for an array.

        Returns:
            A mapping whose `pixel_values` are float32 RGB (B, 3, H, W) in [0, 1].

        Raises:
            TypeError: if an image is of another kind, or its values are.
            ValueError: if its shape or range is not that of an image, or the images differ in size.
        """
        tensors = [_to_tensor(image) for image in _flat(images)]
        if not tensors:
            raise ValueError("The list of images is empty: give at least one.")
        sizes = list(dict.fromkeys(f"{tensor.shape[2]} x {tensor.shape[1]}" for tensor in tensors))
        if len(sizes) > 1:
            raise ValueError(
                f"The images of a batch must have one size, got {', '.join(sizes[:4])} (width x height): process them "
                "one by one, as padding would change what the network makes of them."
            )
        return BatchFeature({"pixel_values": torch.stack(tensors)}, tensor_type=return_tensors)

    def post_process_image_restoration(
        self, outputs: ModelOutput | Tensor, output_type: Literal["pil", "np"] = "pil"
    ) -> list[Image.Image] | list[np.ndarray]:
        """Converts what the network returns to images.

        Args:
            outputs: Output of the network, or its `reconstruction` (B, 3, H, W).
            output_type: "pil" for 8-bit Pillow images, "np" for float32 arrays (H, W, 3).

        Returns:
            One image for each of the batch, clamped to [0, 1].

        Raises:
            ValueError: if the output type is another.
        """
        if output_type not in ("pil", "np"):
            raise ValueError(f'The output_type must be "pil" or "np", got {output_type!r}.')
        reconstruction = outputs if isinstance(outputs, Tensor) else outputs["reconstruction"]
        restored = reconstruction.detach().float().cpu().clamp(0, 1).permute(0, 2, 3, 1).contiguous()
        if output_type == "np":
            return list(restored.numpy())
        return [Image.fromarray(pixels) for pixels in restored.mul(255).round().byte().numpy()]


def _flat(images: Any) -> list[Any]:
    """Single images, whether one, a batch or a list was given."""
    if isinstance(images, list | tuple):
        return list(images)
    if isinstance(images, np.ndarray | Tensor) and images.ndim == 4:
        return list(images)
    return [images]


def _to_tensor(image: Any) -> Tensor:
    """Float32 RGB (3, H, W) in [0, 1] of one image."""
    if isinstance(image, Image.Image):
        return _of_pil(image)
    if isinstance(image, np.ndarray):
        channels_last = image.ndim == 3 and image.shape[-1] in _CHANNELS
        tensor = torch.from_numpy(np.ascontiguousarray(image))
    elif isinstance(image, Tensor):
        channels_last = image.ndim == 3 and image.shape[0] not in _CHANNELS
        tensor = image.detach()
    else:
        raise TypeError(
            f"An image is a {type(image).__name__}: give Pillow images, NumPy arrays or tensors; open a file by "
            "PIL.Image.open."
        )
    return _as_rgb(_in_unit_range(tensor.permute(2, 0, 1) if channels_last else tensor))


def _of_pil(image: Image.Image) -> Tensor:
    """The tensor that `colora_peft.images` gives, on which this package does not depend."""
    image = _upright(image)
    if image.mode.startswith("I;16"):
        return _as_rgb(_in_unit_range(torch.from_numpy(np.array(image, np.uint16))))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"A Pillow image of mode {image.mode} has no agreed white: give an array of floats in [0, 1]."
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous().float().div_(255)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    # Pillow raises nearly anything on damaged EXIF, for which no image is refused.
    except Exception:
        return image


def _in_unit_range(image: Tensor) -> Tensor:
    if image.dtype in (torch.uint8, torch.uint16):
        return image.float().div_(torch.iinfo(image.dtype).max)
    if not image.is_floating_point():
        raise TypeError(f"An image holds {image.dtype} values: give uint8, uint16, or floats in [0, 1].")
    if image.numel() and image.max() > _LARGEST_FLOAT:
        raise ValueError(
            f"An image of floats has values up to {image.max().item():g}: divide it so that white is 1, or give uint8."
        )
    return image.float()


def _as_rgb(image: Tensor) -> Tensor:
    """(H, W) or (C, H, W) with 1, 3 or 4 channels to (3, H, W)."""
    planes = image[None] if image.ndim == 2 else image
    if planes.ndim != 3 or planes.shape[0] not in _CHANNELS or not planes.numel():
        raise ValueError(
            f"An image has the shape {tuple(image.shape)}: give arrays (H, W, C) or tensors (C, H, W) with 1, 3 or 4 "
            "channels."
        )
    if planes.shape[0] == 4:
        planes = planes[:3] * planes[3:] + (1 - planes[3:])
    return planes.expand(3, -1, -1)
