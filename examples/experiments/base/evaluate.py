"""Compares pre-trained networks, bare, on photos that none of them was trained on.

    python -m examples.experiments.base.evaluate --networks path/to/old path/to/new \
        --clean_dirs path/to/kodak --noise_dir path/to/noise/test --output_dir outputs/base

Every network restores the same images: clean photos with each degradation of PROD at three strengths, with random
recipes of PROD, and untouched, and real pairs of noisy photos. The table has the PSNR of inputs and networks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from colora_peft.data import ImageFiles, Pair, PairedImageFolder, sample_generator
from colora_peft.data.patches import degraded_sample
from colora_peft.evaluation import psnr
from colora_peft.hub import load_backbone
from colora_peft.images import as_float, list_images
from colora_peft.inference import evaluation_mode, reconstruct
from colora_peft.prod import Degradation, RandomOrderDegradation, default_degradations
from colora_peft.prod.contact_sheet import STRENGTHS
from colora_peft.utils import flag, run_script, write_json, write_text
from examples.experiments.tables import markdown_table

Figures = dict[str, dict[str, float]]
"""Figure of a condition to its value by network; `input` is the degraded images themselves."""


@dataclass
class BaseArguments:
    """Flags of the comparison."""

    networks: list[str] = flag(help="Folders or Hub ids of the networks, the reference first.")
    clean_dirs: list[str] = flag(help="Folders of clean photos that no network was trained on.")
    noise_dir: str | None = flag(None, "Folder with input/ and target/ of real noise.")
    resolution: int = flag(256, "Side of the degraded crops in pixels.")
    draws: int = flag(3, "Random recipes of PROD for each photo.")
    output_dir: str = flag("outputs/base", "Folder for base.json and base.md.")

    def __post_init__(self) -> None:
        names = [Path(network).name for network in self.networks]
        if len(set(names)) < len(names):
            raise ValueError(f"--networks must have different names at their ends, got {', '.join(names)}.")


# -------------------------------------------------------------------------------------------------------- conditions


def conditions(args: BaseArguments) -> Iterator[tuple[str, int, Callable[[int], Pair]]]:
    """Names of what is restored, the number of its images, and how to make each: (input, target)."""
    photos = ImageFiles([path for folder in args.clean_dirs for path in list_images(folder, nested=True)])
    for degradation in default_degradations():
        for label, strength in STRENGTHS.items():
            crop = partial(degraded_crop, photos, degradation, strength, args.resolution)
            yield f"{degradation.name}, {label}", len(photos), crop
    yield "random recipes of PROD", len(photos) * args.draws, partial(random_crop, photos, args.resolution)
    yield "untouched", len(photos), lambda index: (as_float(photos[index]),) * 2
    if args.noise_dir is not None:
        pairs = PairedImageFolder(args.noise_dir)
        yield "real noise", len(pairs), pairs.__getitem__


def degraded_crop(photos: ImageFiles, degradation: Degradation, strength: float, resolution: int, index: int) -> Pair:
    """The middle of a photo under one degradation at a place in its ranges; the photo's number seeds it."""
    photo = photos[index]
    top, left = ((side - resolution) // 2 for side in photo.shape[-2:])
    clean = as_float(photo[:, top : top + resolution, left : left + resolution].contiguous())
    return degradation.apply(clean, **degradation.setting(strength, seed=index)), clean


def random_crop(photos: ImageFiles, resolution: int, number: int) -> Pair:
    """A random square of a photo under a random recipe of PROD."""
    draw, index = divmod(number, len(photos))
    candidates = [(photos.name(index), partial(photos.__getitem__, index))]
    sample = degraded_sample(candidates, RandomOrderDegradation(), resolution, sample_generator(draw, index))
    return sample["pixel_values"], sample["labels"]


# ------------------------------------------------------------------------------------------------------------ figures


@torch.inference_mode()
def measure(networks: Mapping[str, nn.Module], count: int, pair_of: Callable[[int], Pair]) -> dict[str, list[float]]:
    """PSNR of each image, in dB, of the input and by network."""
    values: dict[str, list[float]] = {name: [] for name in ("input", *networks)}
    for index in range(count):
        degraded, target = (image[None] for image in pair_of(index))
        values["input"].append(psnr(degraded, target).item())
        for name, network in networks.items():
            values[name].append(psnr(restored_by(network, degraded), target).item())
    return values


def restored_by(network: nn.Module, degraded: Tensor) -> Tensor:
    with evaluation_mode(network):
        return reconstruct(network, degraded).float()


def compare(args: BaseArguments) -> Figures:
    """Mean PSNR of every condition, and the lowest of the untouched photos."""
    networks = {Path(name).name: load_backbone(name).to(memory_format=torch.channels_last) for name in args.networks}
    figures: Figures = {}
    for name, count, pair_of in tqdm(list(conditions(args)), desc="conditions"):
        values = measure(networks, count, pair_of)
        figures[name] = {column: mean(of_images) for column, of_images in values.items()}
        if name == "untouched":
            figures["untouched, worst photo"] = {column: min(of_images) for column, of_images in values.items()}
    return figures


def table(figures: Figures) -> str:
    """The figures in Markdown, with the last network minus the first where there are several."""
    columns = list(next(iter(figures.values())))
    compares = len(columns) > 2
    heads = ["condition", *columns, *(["last - first"] if compares else [])]
    rows = []
    for name, row in figures.items():
        cells = [f"{row[column]:.2f}" for column in columns]
        if compares:
            cells.append(f"{row[columns[-1]] - row[columns[1]]:+.2f}")
        rows.append([name, *cells])
    return markdown_table(heads, rows)


def report(results: dict[str, Any]) -> str:
    """The page of base.json, in Markdown."""
    return f"PSNR in dB, the mean over the images.\n\n{table(results['psnr'])}\n"


def main(args: BaseArguments) -> None:
    figures = compare(args)
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    results = {"resolution": args.resolution, "draws": args.draws, "psnr": figures}
    write_json(output_dir / "base.json", results)
    page = report(results)
    write_text(output_dir / "base.md", page)
    print(page)


if __name__ == "__main__":
    run_script(main, BaseArguments)
