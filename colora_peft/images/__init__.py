"""Images: from files to tensors and back.

A tensor is float32 RGB (3, H, W) in [0, 1]. `read_image` and `to_pil` convert values alone; `read_image_file` and
`write_image_file` keep what else a file holds: bit depth, EXIF, colour profile and transparency.
"""

from .formats import FORMATS, format_of
from .icc import describe_same_colours, fitting_profile, profile_name, read_profile
from .image_file import ImageFile, encode_image_file, read_image_file, write_image_file
from .kinds import IMAGE_FORMATS, IMAGE_SUFFIXES, READ_ONLY_SUFFIXES, check_kind, left_out_in_words, no_images_in_words
from .limits import DEFAULT_MAX_PIXELS, without_pillow_s_limit
from .listing import count_kinds, list_images, only_images, walk_files
from .reading import (
    as_float,
    decode_stored,
    is_turned,
    read_bytes,
    read_image,
    read_stored,
    to_pil,
    why_turned,
)
from .sheets import encode_sheet, paint_sheet, save_comparison, save_sheet

__all__ = [
    "DEFAULT_MAX_PIXELS",
    "FORMATS",
    "IMAGE_FORMATS",
    "IMAGE_SUFFIXES",
    "ImageFile",
    "READ_ONLY_SUFFIXES",
    "as_float",
    "check_kind",
    "count_kinds",
    "decode_stored",
    "describe_same_colours",
    "encode_image_file",
    "encode_sheet",
    "fitting_profile",
    "format_of",
    "is_turned",
    "left_out_in_words",
    "list_images",
    "no_images_in_words",
    "only_images",
    "paint_sheet",
    "profile_name",
    "read_bytes",
    "read_image",
    "read_image_file",
    "read_profile",
    "read_stored",
    "save_comparison",
    "save_sheet",
    "to_pil",
    "walk_files",
    "why_turned",
    "without_pillow_s_limit",
    "write_image_file",
]
