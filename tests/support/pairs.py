"""Image files and datasets of them, for tests of data."""

import cv2
import datasets
import numpy as np
from PIL import Image

from colora_peft.images import list_images


def save(path, height=10, width=12, seed=0, dtype=np.uint8):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, (height, width, 3), dtype=dtype)
    cv2.imwrite(str(path), pixels)
    return path


def kinds(folder):
    """A file of each kind that a corpus may hold, 16 pixels a side."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    colour = Image.fromarray(noise[..., :3])
    Image.fromarray(noise[..., 0]).save(folder / "grey.png")
    Image.fromarray(noise).save(folder / "alpha.png")
    colour.quantize(16).save(folder / "palette.png")
    colour.convert("CMYK").save(folder / "cmyk.jpg")
    save(folder / "deep.png", 16, 16, dtype=np.uint16)
    return folder


def dataset_of(folder):
    paths = list_images(folder)
    rows = {"photo": [str(path) for path in paths], "label": list(range(len(paths)))}
    return datasets.Dataset.from_dict(rows).cast_column("photo", datasets.Image())
