"""The scripts under examples/ as modules, and small pairs of images for them."""

import importlib.util
import sys
from pathlib import Path

import torch

from colora_peft.images import to_pil

TESTS = Path(__file__).parents[1]
EXAMPLES = TESTS.parent / "examples"
# The scripts import their neighbours.
sys.path.append(str(EXAMPLES))


def write_pairs(folder: Path, count: int, size: int = 48) -> Path:
    """`count` pairs whose target is the input with red and blue exchanged, in input/ and target/."""
    generator = torch.Generator().manual_seed(count)
    for side in ("input", "target"):
        (folder / side).mkdir(parents=True)
    for index in range(count):
        coarse = torch.rand(1, 3, 6, 6, generator=generator)
        image = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")[0]
        to_pil(image).save(folder / "input" / f"scene{index}.png")
        to_pil(image.flip(0)).save(folder / "target" / f"scene{index}.png")
    return folder


def load_example(name: str):
    """One of the scripts under examples/ as a module."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
