"""Helpers shared by tests: those of data/test_pairs.py."""

import cv2
import numpy as np


def save(path, height=10, width=12, seed=0, dtype=np.uint8):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, (height, width, 3), dtype=dtype)
    cv2.imwrite(str(path), pixels)
    return path
