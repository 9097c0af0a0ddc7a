"""Helpers shared by tests: those of images/test_formats.py."""

import numpy as np


def pixels(dtype, channels, height=13, width=17, seed=0):
    limit = np.iinfo(dtype).max + 1
    return np.random.default_rng(seed).integers(0, limit, (height, width, channels), dtype=dtype)
