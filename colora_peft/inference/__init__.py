"""Inference: run a restoration network on images of any size.

`restore_image` restores one image in blended tiles, with pooling over the whole image and self-ensembles.
The module `network` holds the contract of a restoration network: what goes in, what comes out, and its loss.
"""

from .local_pooling import local_pooling, pools_locally
from .network import (
    evaluation_mode,
    needed_multiple,
    output_images,
    reconstruct,
    restoration_loss,
    tile_multiple,
)
from .tile_grid import check_tile
from .tiling import NotFinite, Pooling, restore_image

__all__ = [
    "NotFinite",
    "Pooling",
    "check_tile",
    "evaluation_mode",
    "local_pooling",
    "needed_multiple",
    "output_images",
    "pools_locally",
    "reconstruct",
    "restoration_loss",
    "restore_image",
    "tile_multiple",
]
