"""Patches a second that one core degrades with PROD, and with the same five degradations of an augmentation library.

    pip install "albumentations>=2,<3"
    python -m examples.experiments.prod_speed.run

PROD and the library take turns, degradation by degradation, on the same patches and for the mix the same orders. Time
is processor time of this thread, so that other programs on the core cost little. A ratio is the median, over the
rounds, of the ratio within a round. Albumentations is used here alone; colora-peft does not depend on it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import psutil
import torch
from torch import Tensor

from colora_peft.data import random_patch, sample_generator
from colora_peft.images import list_images, read_image
from colora_peft.prod import RandomOrderDegradation, default_degradations
from colora_peft.utils import check_at_least, flag, run_script
from examples.experiments.measure import (
    Row,
    machine_facts,
    machine_name,
    median_ratio,
    save_results,
    settings_text,
    shown,
    take_turns,
)
from examples.experiments.prod_speed.library import library_transforms, to_network
from examples.experiments.tables import markdown_table

Run = Callable[[], None]
PHOTOS = Path(__file__).parents[2] / "data" / "underwater" / "train" / "target"


@dataclass
class ProdSpeedArguments:
    """Flags of the measurement."""

    train_dir: str = flag(str(PHOTOS), "Folder of clean images.")
    resolution: int = flag(256, "Side of the square patches in pixels.")
    patches: int = flag(40, "Number of patches in a turn, each with draws of its own.")
    rounds: int = flag(5, "Number of turns, after one that does not count.")
    memory_patches: int = flag(2_000, "Number of patches over which the memory is watched.")
    library: Literal["albumentations", "none"] = flag(
        "albumentations", "Library to compare with; none measures PROD alone."
    )
    output_dir: str = flag(str(Path(__file__).parent), "Folder for the results.")

    def __post_init__(self) -> None:
        for name in ("patches", "rounds", "memory_patches"):
            check_at_least(self, name, 1)


def clean_patches(args: ProdSpeedArguments) -> list[Tensor]:
    """Random patches (3, H, W) of the images."""
    images = [read_image(path) for path in list_images(args.train_dir)]
    return [
        random_patch((images[number % len(images)],), args.resolution, sample_generator(number), f"photo {number}")[0]
        for number in range(args.patches)
    ]


# ----------------------------------------------------------------------------------------------------- measurements


def in_turns(run_mix: Callable[[int], None], run_one: Callable[[int, str], None], names: list[str]) -> dict[str, Run]:
    """The runs of the mix and of each degradation, which know the number of their turn by counting."""

    def counted(run: Callable[..., None], *arguments: str) -> Run:
        turns = count()
        return lambda: run(next(turns), *arguments)

    return {"mix": counted(run_mix), **{name: counted(run_one, name) for name in names}}


def prod_runs(patches: list[Tensor]) -> dict[str, Run]:
    """The mix and each degradation: a run draws and applies it to all patches, with other draws in each turn."""
    mix, parts = RandomOrderDegradation(), {each.name: each for each in default_degradations()}

    def run_mix(turn: int) -> None:
        for number, patch in enumerate(patches):
            mix.apply(patch, mix.draw(sample_generator(turn, number)))

    def run_one(turn: int, name: str) -> None:
        for number, patch in enumerate(patches):
            parts[name].apply(patch, **parts[name].draw(sample_generator(turn, number)))

    return in_turns(run_mix, run_one, list(parts))


def library_runs(patches: list[Tensor], rounds: int, plain_noise: bool) -> dict[str, Run]:
    """The same for the library, from the 8 bits it prefers to the same float tensor; the mix has PROD's orders.

    There is no mix where PROD has degradations that the library has not.
    """
    pixels = [np.ascontiguousarray(patch.permute(1, 2, 0).mul(255).round().byte().numpy()) for patch in patches]
    parts, mix = library_transforms(plain_noise), RandomOrderDegradation()
    orders = [
        [
            [str(step["degradation"]) for step in mix.draw(sample_generator(turn, number))]
            for number in range(len(pixels))
        ]
        for turn in range(rounds + 1)
    ]

    def run_mix(turn: int) -> None:
        for image, order in zip(pixels, orders[turn], strict=True):
            for name in order:
                image = parts[name](image)
            to_network(image)

    def run_one(turn: int, name: str) -> None:
        for image in pixels:
            to_network(parts[name](image))

    runs = in_turns(run_mix, run_one, list(parts))
    if not {each.name for each in default_degradations()} <= parts.keys():
        del runs["mix"]
    return runs


def speeds(args: ProdSpeedArguments, patches: list[Tensor]) -> Iterator[Row]:
    """One row for the mix and for each degradation."""
    contestants = {"prod": prod_runs(patches)}
    if args.library != "none":
        contestants |= {
            "library": library_runs(patches, args.rounds, plain_noise=False),
            "library, plain noise": library_runs(patches, args.rounds, plain_noise=True),
        }
    for name in contestants["prod"]:
        runs = {who: own[name] for who, own in contestants.items() if name in own}
        seconds = take_turns(runs, args.rounds, clock=time.thread_time)
        rates = {who: args.patches / statistics.median(own) for who, own in seconds.items()}
        ratios = {who: median_ratio(own, seconds["prod"]) for who, own in seconds.items() if who != "prod"}
        yield {"degradation": name, "patches_per_second_and_core": rates, "times_as_fast_as": ratios}


def memory_over_time(patches: list[Tensor], count: int) -> Row:
    """Resident MB of this process after a tenth of `count` degraded patches, at the end, and at its peak between."""
    process, run, sizes = psutil.Process(), RandomOrderDegradation(), []
    for number in range(count):
        run.apply(patches[number % len(patches)], run.draw(sample_generator(7, number)))
        if number >= count // 10:
            sizes.append(process.memory_info().rss / 1e6)
    return {"patches": count, "after_warm_up_mb": sizes[0], "peak_mb": max(sizes), "at_the_end_mb": sizes[-1]}


# ----------------------------------------------------------------------------------------------------------- report


def line(row: Row) -> list[str]:
    """Cells of a line of the table."""
    rates = [f"{rate:,.0f}" for rate in row["patches_per_second_and_core"].values()]
    return [row["degradation"], *rates, *(f"{ratio:.2f}x" for ratio in row["times_as_fast_as"].values())]


def report(results: Row) -> str:
    """Markdown: facts and flags, a line for each degradation, and the memory."""
    others, memory = list(max((row["times_as_fast_as"] for row in results["rows"]), key=len)), results["memory"]
    heads = ["", "PROD", *others, *(f"PROD to {who}" for who in others)]
    lines = [cells + ["-"] * (len(heads) - len(cells)) for cells in map(line, results["rows"])]
    return f"""Made by `python -m examples.experiments.prod_speed.run`: {settings_text(results, "rows", "memory")}.

Patches per second and core, drawing included (processor time of one thread), and how many times as fast PROD is.
`mix` is PROD's random subsets in random order. The library's transforms are in `prod_speed/library.py`: the nearest
in kind, and, as "plain noise", the same with its cheapest noise, which is neither signal-dependent nor coloured.

{markdown_table(heads, lines)}

Memory of the process over {memory["patches"]:,} patches: {memory["after_warm_up_mb"]:.1f} MB after the first tenth,
{memory["peak_mb"]:.1f} MB at most, {memory["at_the_end_mb"]:.1f} MB at the end.
"""


def main(args: ProdSpeedArguments) -> None:
    """Measures and writes one JSON file for each kind of hardware, with its tables beside it."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    library = [] if args.library == "none" else [args.library]
    facts = machine_facts(torch.device("cpu"), "torch", "opencv-python-headless", "numpy", *library) | asdict(args)
    facts = {key: value for key, value in facts.items() if key not in ("output_dir", "train_dir", "library")}
    patches = clean_patches(args)
    memory = memory_over_time(patches, args.memory_patches)
    results = {**facts, "rows": shown(speeds(args, patches), line), "memory": memory}
    save_results(args.output_dir, machine_name(facts), results, report)


if __name__ == "__main__":
    run_script(main, ProdSpeedArguments)
