"""What tiles cost in dB, for the choices of `colora_peft.restore_image`, and how much memory a large image takes.

    python examples/benchmark_tiles.py
    python examples/benchmark_tiles.py --adapter outputs/finetune --data photos/test more/photos
    python examples/benchmark_tiles.py --memory 7680x4320

The first two compare tiled with untiled images, and both with the clean ones; each folder of --data holds input/ and
target/. The third restores an image of noise in a fresh process and tells its peak memory; without
--model_name_or_path by a NAFNet of width 32 (17 M parameters) with a CoLoRA adapter, both untrained.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import psutil
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import HfArgumentParser

from colora_peft import CoLoRAConfig, restore_image
from colora_peft.data import PairedImageFolder
from colora_peft.evaluation import psnr
from colora_peft.hub import hardware_name, load_backbone
from colora_peft.utils import relative_path, write_json, write_text

HERE = Path(__file__).parent
SHIPPED_NETWORK = relative_path(HERE / "checkpoints" / "nafnet-small-prod")
Row = dict[str, object]
Settings = dict[str, object]


@dataclass
class TilesArguments:
    """Flags of the benchmark."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": f"The network: a folder, an id on the Hub, module:function ({SHIPPED_NETWORK})."},
    )
    adapter: str | None = field(default=None, metadata={"help": "Folder of an adapter for it."})
    data: list[str] = field(
        default_factory=lambda: [relative_path(HERE / "data" / "underwater" / "test")],
        metadata={"help": "Folders with input/ and target/."},
    )
    max_images: int | None = field(default=None, metadata={"help": "At most so many of each, evenly spread."})
    tiles: list[str] = field(
        default_factory=lambda: ["128/32", "256/32", "256/64", "256/128", "512/64"],
        metadata={"help": "tile/overlap, both in pixels."},
    )
    statistics_passes: list[int] = field(
        default_factory=lambda: [1, 2], metadata={"help": 'Numbers of passes for pooling="picture".'}
    )
    pooling_windows: list[int] = field(
        default_factory=lambda: [192, 384], metadata={"help": 'Windows in pixels for pooling="local"; -1 for none.'}
    )
    memory: str | None = field(
        default=None, metadata={"help": "Instead: the peak memory of an image of this width x height in pixels."}
    )
    memory_pooling: str = field(
        default="picture", metadata={"help": "pooling of that; tile takes a third of the time."}
    )
    name: str = field(default="tiles", metadata={"help": "Beginning of the names of the files of results."})
    output_dir: str = field(default=str(HERE / "benchmark_results"), metadata={"help": "Where the results go."})


# ------------------------------------------------------------------------------------------------------------- dB


def choices(args: TilesArguments) -> Iterator[tuple[str, Settings]]:
    """(label, settings of `restore_image`) of all that is compared; first those without tiles."""
    windows = [window for window in args.pooling_windows if window > 0]
    local = [("local", {"pooling": "local", "pooling_window": window}) for window in windows]
    yield "picture", {"tile": None}
    for label, settings in local:
        yield label, {"tile": None, **settings}
    statistics = [
        ("picture", {"pooling": "picture", "statistics_passes": number}) for number in args.statistics_passes
    ]
    for text in args.tiles:
        tile, overlap = sizes(text, "/", "--tiles")
        for label, settings in [("tile", {"pooling": "tile"}), *statistics, *local]:
            yield label, {"tile": tile, "overlap": overlap, **settings}


def sizes(text: str, separator: str, flag: str) -> tuple[int, int]:
    """Two numbers out of "128/32" or "7680x4320"."""
    match = re.fullmatch(rf"(\d+){separator}(\d+)", text)
    if match is None:
        raise ValueError(f"{flag} takes two numbers as in 512{separator}64, got {text!r}.")
    return int(match[1]), int(match[2])


def decibels(first: Tensor, second: Tensor) -> float:
    return psnr(first[None], second[None]).item()


def measure(model: nn.Module, folder: str, args: TilesArguments) -> Iterator[list[Row]]:
    """After each image of `folder`, one row for each choice: dB over the images so far, and seconds an image."""
    pairs, offered = PairedImageFolder(folder), list(choices(args))
    count = min(len(pairs), args.max_images or len(pairs))
    figures: list[list[tuple[float, ...]]] = [[] for _ in offered]
    for index in torch.linspace(0, len(pairs) - 1, count).round().int().tolist():
        degraded, target = pairs[index]
        untiled: dict[object, Tensor] = {}
        for own, (_, settings) in zip(figures, offered, strict=True):
            start = time.perf_counter()
            restored = restore_image(model, degraded, **settings)
            seconds = time.perf_counter() - start
            key = settings.get("pooling_window")
            if settings["tile"] is None:
                untiled[key] = restored
            own.append(
                (
                    decibels(restored, untiled[None]),
                    decibels(restored, untiled[key]),
                    decibels(restored, target),
                    seconds,
                )
            )
        yield summary(offered, figures)


def summary(offered: list[tuple[str, Settings]], figures: list[list[tuple[float, ...]]]) -> list[Row]:
    """One row for each choice, from its figures of each image."""
    rows: list[Row] = []
    for own, (label, settings) in zip(figures, offered, strict=True):
        columns = torch.tensor(own, dtype=torch.float64)
        means = columns.mean(0).tolist()
        rows.append(
            {
                "pooling": label,
                **{key: settings.get(key) for key in ("tile", "overlap", "statistics_passes", "pooling_window")},
                "psnr_to_untiled": means[0],
                "lowest_psnr_to_untiled": columns[:, 0].min().item(),
                "psnr_to_untiled_of_same_pooling": means[1],
                "psnr_to_target": means[2],
                "psnr_to_target_less_untiled": means[2] - rows[0]["psnr_to_target"] if rows else 0.0,
                "seconds": means[3],
                "pictures": len(own),
            }
        )
    return rows


def table(rows: list[Row]) -> str:
    """Markdown: a line for each choice."""
    heads = ["tile / overlap", "pooling", "to untiled, mean", "lowest", "to untiled of the same pooling", "to target",
             "less untiled", "s an image"]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        tiles = "untiled" if row["tile"] is None else f"{row['tile']} / {row['overlap']}"
        pooling = str(row["pooling"])
        if row["statistics_passes"]:
            pooling += f", {row['statistics_passes']} passes" if row["statistics_passes"] > 1 else ", 1 pass"
        if row["pooling_window"]:
            pooling += f" {row['pooling_window']}"
        cells = [f"{row['psnr_to_untiled']:.1f}", f"{row['lowest_psnr_to_untiled']:.1f}",
                 f"{row['psnr_to_untiled_of_same_pooling']:.1f}", f"{row['psnr_to_target']:.2f}",
                 f"{row['psnr_to_target_less_untiled']:+.2f}", f"{row['seconds']:.1f}"]  # fmt: skip
        lines.append(f"| {' | '.join([tiles, pooling, *cells])} |")
    return "\n".join(lines)


def load(args: TilesArguments) -> nn.Module:
    model = load_backbone(args.model_name_or_path or SHIPPED_NETWORK)
    model = model if args.adapter is None else PeftModel.from_pretrained(model, args.adapter)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


# --------------------------------------------------------------------------------------------------------- memory


def memory_of(args: TilesArguments) -> Row:
    """Peak resident memory of this process, which must be fresh, while it restores one image on the CPU."""
    width, height = sizes(args.memory, "x", "--memory")
    if args.model_name_or_path is None:
        from colora_peft.models import NAFNetConfig, NAFNetForImageRestoration

        torch.manual_seed(0)
        model = get_peft_model(NAFNetForImageRestoration(NAFNetConfig()), CoLoRAConfig())
    else:
        model = load_backbone(args.model_name_or_path)
        model = model if args.adapter is None else PeftModel.from_pretrained(model, args.adapter)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    before = peak_bytes()
    image = torch.rand(3, height, width)
    restored = restore_image(model, image, pooling=args.memory_pooling, progress=True)
    return {
        "picture": args.memory,
        "network": args.model_name_or_path or "NAFNet of width 32 with a CoLoRA adapter",
        "parameters": parameters,
        "pooling": args.memory_pooling,
        "peak_bytes": peak_bytes(),
        "peak_bytes_before_the_picture": before,
        "picture_and_result_bytes": image.nbytes + restored.nbytes,
    }


def peak_bytes() -> int:
    """The most memory that this process has ever had resident."""
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return info.peak_wset
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_line(row: Row) -> str:
    gigabytes = [row[key] / 1e9 for key in ("peak_bytes", "peak_bytes_before_the_picture", "picture_and_result_bytes")]
    return (
        f'{row["picture"]} by {row["network"]}, pooling="{row["pooling"]}": at most {gigabytes[0]:.2f} GB of memory, '
        f"of which {gigabytes[1]:.2f} GB before there was an image and {gigabytes[2]:.2f} GB are image and result."
    )


# ------------------------------------------------------------------------------------------------------------ main


def report(facts: Settings, results: dict[str, list[Row]]) -> str:
    """The Markdown file."""
    settings = ", ".join(f"{key} {value}" for key, value in facts.items())
    tables = "\n\n".join(
        f"## {folder}, {rows[0]['pictures']} images\n\n{table(rows)}" for folder, rows in results.items()
    )
    return f"""Made by `python examples/benchmark_tiles.py`: {settings}.

PSNR in dB after rounding to 8 bits, per image, then averaged: to the untiled image of whole-image pooling (mean
and lowest), to the untiled image of the same pooling, to the clean image, and the last less that of the untiled
image. Pooling: "tile" over each tile, "picture" by statistics gathered in passes before, "local" over windows (TLC).
Seconds are those of this machine as busy as it was.

{tables}
"""


def main(args: TilesArguments) -> None:
    if args.memory is not None:
        sizes(args.memory, "x", "--memory")
    list(choices(args))
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"hardware": hardware_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))}
    facts |= {name: version(name) for name in ("torch", "peft")}
    if args.memory is not None:
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            row = fresh.submit(memory_of, args).result()
        write_json(folder / f"{args.name}-memory-{args.memory}.json", {**facts, **row})
        print(memory_line(row))
        return
    model = load(args)
    facts["model_name_or_path"] = args.model_name_or_path or SHIPPED_NETWORK
    if args.adapter is not None:
        facts["adapter"] = Path(args.adapter).name
    results: dict[str, list[Row]] = {}
    for data in args.data:
        name = "/".join(Path(data).resolve().parts[-2:])
        for rows in measure(model, data, args):
            results[name] = rows
            print(f"\n{name}, {rows[0]['pictures']} images\n{table(rows)}", flush=True)
            write_json(folder / f"{args.name}.json", {**facts, "results": results})
            write_text(folder / f"{args.name}.md", report(facts, results))
    print(f"wrote {folder / args.name}.md")


if __name__ == "__main__":
    try:
        main(HfArgumentParser(TilesArguments).parse_args_into_dataclasses()[0])
    except (ValueError, TypeError, OSError, ImportError) as error:
        sys.exit(f"benchmark_tiles.py: {error}")
