"""How fast one core degrades patches with PROD, and with the same five degradations of an augmentation library.

    pip install "albumentations>=2,<3"
    python examples/benchmark_prod.py

PROD and the library take turns, degradation by degradation, on the same patches and for the mix the same orders. Time
is processor time of this thread, so that other programs on the core cost little; a ratio is the median, over the
rounds, of the ratio within a round. Albumentations is used here alone and is no dependency of colora-peft.
"""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import psutil
import torch
from prod_library import library_transforms, to_network
from torch import Tensor
from transformers import HfArgumentParser

from colora_peft.data import random_patch, sample_generator
from colora_peft.hub import hardware_name
from colora_peft.images import list_images, read_image
from colora_peft.prod import RandomOrderDegradation, default_degradations
from colora_peft.utils import write_json, write_text

Row = dict[str, object]
PHOTOS = Path(__file__).parent / "data" / "underwater" / "train" / "target"


@dataclass
class ProdBenchmarkArguments:
    """Flags of the benchmark."""

    train_dir: str = field(default=str(PHOTOS), metadata={"help": "Folder of clean photos."})
    resolution: int = field(default=256, metadata={"help": "Side of the square patches in pixels."})
    patches: int = field(default=40, metadata={"help": "Patches, each with draws of its own, in a turn."})
    rounds: int = field(default=5, metadata={"help": "Turns, after one that does not count."})
    memory_patches: int = field(default=2_000, metadata={"help": "Patches over which the memory is watched."})
    library: Literal["albumentations", "none"] = field(
        default="albumentations", metadata={"help": "What to compare with; none measures PROD alone."}
    )
    output_dir: str = field(
        default=str(Path(__file__).parent / "benchmark_results"), metadata={"help": "Where the results go."}
    )


def clean_patches(args: ProdBenchmarkArguments) -> list[Tensor]:
    """`args.patches` random patches (3, H, W) of the photos."""
    images = [read_image(path) for path in list_images(args.train_dir)]
    return [
        random_patch((images[number % len(images)],), args.resolution, sample_generator(number), f"photo {number}")[0]
        for number in range(args.patches)
    ]


# ---------------------------------------------------------------------------------------------------- what is timed


def prod_runs(patches: list[Tensor]) -> dict[str, Callable[[int], None]]:
    """Degradation or "mix" to a function of the round that draws and applies it to all patches."""
    mix, parts = RandomOrderDegradation(), {each.name: each for each in default_degradations()}

    def run_mix(turn: int) -> None:
        for number, patch in enumerate(patches):
            mix.apply(patch, mix.draw(sample_generator(turn, number)))

    def run_one(name: str) -> Callable[[int], None]:
        def run(turn: int) -> None:
            for number, patch in enumerate(patches):
                parts[name].apply(patch, **parts[name].draw(sample_generator(turn, number)))

        return run

    return {"mix": run_mix, **{name: run_one(name) for name in parts}}


def library_runs(patches: list[Tensor], rounds: int, plain_noise: bool) -> dict[str, Callable[[int], None]]:
    """The same for the library, from the 8 bits it prefers to the same float tensor; PROD's orders are given to it."""
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

    def run_one(name: str) -> Callable[[int], None]:
        def run(turn: int) -> None:
            for image in pixels:
                to_network(parts[name](image))

        return run

    return {"mix": run_mix, **{name: run_one(name) for name in parts}}


# ------------------------------------------------------------------------------------------------------- measurement


def take_turns(runs: dict[str, Callable[[int], None]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each run in each round; every other round goes backwards, the first does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name in list(runs) if turn % 2 else list(runs)[::-1]:
            start = time.thread_time()
            runs[name](turn)
            if turn:
                seconds[name].append(time.thread_time() - start)
    return seconds


def speeds(args: ProdBenchmarkArguments, patches: list[Tensor]) -> Iterator[Row]:
    """One row for the mix and for each degradation."""
    contestants = {"prod": prod_runs(patches)}
    if args.library != "none":
        contestants |= {
            "library": library_runs(patches, args.rounds, plain_noise=False),
            "library, plain noise": library_runs(patches, args.rounds, plain_noise=True),
        }
    for name in contestants["prod"]:
        seconds = take_turns({who: runs[name] for who, runs in contestants.items()}, args.rounds)
        rates = {who: args.patches / statistics.median(own) for who, own in seconds.items()}
        ratios = {
            who: statistics.median(theirs / ours for theirs, ours in zip(own, seconds["prod"], strict=True))
            for who, own in seconds.items()
            if who != "prod"
        }
        yield {"degradation": name, "patches_per_second_and_core": rates, "times_as_fast_as": ratios}


def memory_over_time(patches: list[Tensor], count: int) -> Row:
    """Resident MB of this process after a tenth of `count` degraded patches, and at the end, with the peak between."""
    process, run, sizes = psutil.Process(), RandomOrderDegradation(), []
    for number in range(count):
        run.apply(patches[number % len(patches)], run.draw(sample_generator(7, number)))
        if number >= count // 10:
            sizes.append(process.memory_info().rss / 1e6)
    return {"patches": count, "after_warm_up_mb": sizes[0], "peak_mb": max(sizes), "at_the_end_mb": sizes[-1]}


# ------------------------------------------------------------------------------------------------------------ report


def table(rows: list[Row]) -> str:
    """Markdown: a line for each degradation."""
    others = list(rows[0]["times_as_fast_as"])
    heads = ["", "PROD", *others, *(f"PROD to {who}" for who in others)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        rates = [f"{rate:,.0f}" for rate in row["patches_per_second_and_core"].values()]
        ratios = [f"{ratio:.2f}x" for ratio in row["times_as_fast_as"].values()]
        lines.append(f"| {' | '.join([row['degradation'], *rates, *ratios])} |")
    return "\n".join(lines)


def report(facts: dict[str, object], rows: list[Row], memory: Row) -> str:
    """The Markdown file."""
    settings = ", ".join(f"{key} {value}" for key, value in facts.items())
    return f"""Made by `python examples/benchmark_prod.py`: {settings}.

Patches per second and core, drawing included (processor time of one thread), and how many times as fast PROD is.
`mix` is PROD's random subsets in random order. The library's transforms are in `examples/prod_library.py`: the nearest
in kind, and, as "plain noise", the same with its cheapest noise, which is neither signal-dependent nor coloured.

{table(rows)}

Memory of the process over {memory["patches"]:,} patches: {memory["after_warm_up_mb"]:.1f} MB after the first tenth,
{memory["peak_mb"]:.1f} MB at most, {memory["at_the_end_mb"]:.1f} MB at the end.
"""


def main(args: ProdBenchmarkArguments) -> None:
    """Measure and write one JSON file for each kind of hardware, with its tables beside it."""
    if min(args.patches, args.rounds, args.memory_patches) < 1:
        raise ValueError("--patches, --rounds and --memory_patches must be at least 1.")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    names = ["torch", "opencv-python-headless", "numpy", *([args.library] if args.library != "none" else [])]
    facts = {"hardware": hardware_name(torch.device("cpu")), "python": sys.version.split()[0]}
    facts |= {name: version(name) for name in names} | asdict(args)
    facts = {key: value for key, value in facts.items() if key not in ("output_dir", "train_dir", "library")}
    patches, rows = clean_patches(args), []
    memory = memory_over_time(patches, args.memory_patches)
    for row in speeds(args, patches):
        rows.append(row)
        print(table(rows).splitlines()[-1], flush=True)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9.]+", "-", f"prod {facts['hardware']} torch{facts['torch']}".lower()).strip("-")
    write_json(folder / f"{name}.json", {**facts, "rows": rows, "memory": memory})
    write_text(folder / f"{name}.md", report(facts, rows, memory))
    print(f"wrote {folder / name}.md")


if __name__ == "__main__":
    try:
        main(HfArgumentParser(ProdBenchmarkArguments).parse_args_into_dataclasses()[0])
    except (ValueError, ImportError) as error:
        sys.exit(f"benchmark_prod.py: {error}")
