"""Helpers shared by tests: those of images/test_icc.py."""

from functools import cache

from PIL import ImageCms


@cache  # it holds the second in which it was made
def srgb():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def profile(space):
    """sRGB's, which says that it describes something else."""
    data = bytearray(srgb())
    data[16:20] = space
    return bytes(data)
