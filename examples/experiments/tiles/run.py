"""Loss of quality by tiles, in dB, for the choices of `colora_peft.restore_image`; and the memory of a large image.

    python -m examples.experiments.tiles.run
    python -m examples.experiments.tiles.run --adapter outputs/finetune --data photos/test more/photos
    python -m examples.experiments.tiles.run --memory 7680x4320

The first two compare tiled with untiled images, and both with the clean ones; each folder of --data holds input/ and
target/. The third restores an image of noise in a fresh process and prints its peak memory. Its network is a NAFNet of
width 32 (17 M parameters) with a CoLoRA adapter, both untrained, unless --model_name_or_path names another.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from colora_peft import CoLoRAConfig, restore_image
from colora_peft.data import PairedImageFolder
from colora_peft.evaluation import psnr
from colora_peft.hub import load_backbone
from colora_peft.models import NAFNetConfig, NAFNetForImageRestoration
from colora_peft.utils import flag, relative_path, run_script, write_json
from examples.experiments.measure import Row, device, in_fresh_process, machine_facts, save_results, settings_text
from examples.experiments.tables import markdown_table

EXAMPLES = Path(__file__).parents[2]
SHIPPED_NETWORK = relative_path(EXAMPLES / "checkpoints" / "nafnet-small-prod")
Settings = dict[str, object]


@dataclass
class TilesArguments:
    """Flags of the measurement."""

    model_name_or_path: str | None = flag(
        None, f"The network: a folder, an id on the Hub, module:function ({SHIPPED_NETWORK})."
    )
    adapter: str | None = flag(None, "Folder of an adapter for the network.")
    data: list[str] = flag(
        factory=lambda: [relative_path(EXAMPLES / "data" / "underwater" / "test")],
        help="Folders with input/ and target/.",
    )
    max_pictures: int | None = flag(None, "Largest number of images of each folder, evenly spread. Default: all.")
    tiles: list[str] = flag(
        factory=lambda: ["128/32", "256/32", "256/64", "256/128", "512/64"],
        help="Sizes as tile/overlap, both in pixels.",
    )
    statistics_passes: list[int] = flag(factory=lambda: [1, 2], help='Numbers of passes for pooling="picture".')
    pooling_windows: list[int] = flag(
        factory=lambda: [192, 384], help='Windows in pixels for pooling="local"; -1 for none.'
    )
    memory: str | None = flag(None, "Instead: the peak memory of an image of this width x height in pixels.")
    memory_pooling: str = flag("picture", "Pooling for --memory; tile takes a third of the time.")
    name: str = flag("tiles", "Beginning of the names of the files of results.")
    output_dir: str = flag(str(Path(__file__).parent), "Folder for the results.")


# ------------------------------------------------------------------------------------------------------------- dB


def choices(args: TilesArguments) -> Iterator[tuple[str, Settings]]:
    """Labels and settings of `restore_image` of all choices; first those without tiles."""
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
    """Two numbers from "128/32" or "7680x4320"."""
    match = re.fullmatch(rf"(\d+){separator}(\d+)", text)
    if match is None:
        raise ValueError(f"{flag} takes two numbers as in 512{separator}64, got {text!r}.")
    return int(match[1]), int(match[2])


def decibels(first: Tensor, second: Tensor) -> float:
    """PSNR of one image compared with another."""
    return psnr(first[None], second[None]).item()


def measure(model: nn.Module, folder: str, args: TilesArguments) -> Iterator[list[Row]]:
    """Yields after each image of `folder` the rows of all choices: dB over the images so far, and seconds an image."""
    pairs, offered = PairedImageFolder(folder), list(choices(args))
    count = min(len(pairs), args.max_pictures or len(pairs))
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
            compared = (untiled[None], untiled[key], target)
            own.append((*(decibels(restored, other) for other in compared), seconds))
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
             "minus untiled", "s an image"]  # fmt: skip
    lines = []
    for row in rows:
        tiles = "untiled" if row["tile"] is None else f"{row['tile']} / {row['overlap']}"
        pooling = str(row["pooling"])
        if row["statistics_passes"]:
            pooling += f", {row['statistics_passes']} passes" if row["statistics_passes"] > 1 else ", 1 pass"
        if row["pooling_window"]:
            pooling += f" {row['pooling_window']}"
        names = ("psnr_to_untiled", "lowest_psnr_to_untiled", "psnr_to_untiled_of_same_pooling")
        figures = [*(f"{row[name]:.1f}" for name in names), f"{row['psnr_to_target']:.2f}"]
        lines.append([tiles, pooling, *figures, f"{row['psnr_to_target_less_untiled']:+.2f}", f"{row['seconds']:.1f}"])
    return markdown_table(heads, lines)


def load(path: str, adapter: str | None) -> nn.Module:
    """The network on the CPU, with the adapter if there is one."""
    network = load_backbone(path)
    return network if adapter is None else PeftModel.from_pretrained(network, adapter)


# --------------------------------------------------------------------------------------------------------- memory


def memory_of(args: TilesArguments) -> Row:
    """Peak resident memory of this process, which must be fresh, while it restores one image on the CPU."""
    width, height = sizes(args.memory, "x", "--memory")
    if args.model_name_or_path is None:
        torch.manual_seed(0)
        model = get_peft_model(NAFNetForImageRestoration(NAFNetConfig()), CoLoRAConfig())
    else:
        model = load(args.model_name_or_path, args.adapter)
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
    """Largest resident memory that this process has ever had."""
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return info.peak_wset
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_line(row: Row) -> str:
    """The result of --memory as one sentence."""
    gigabytes = [row[key] / 1e9 for key in ("peak_bytes", "peak_bytes_before_the_picture", "picture_and_result_bytes")]
    return (
        f'{row["picture"]} by {row["network"]}, pooling="{row["pooling"]}": at most {gigabytes[0]:.2f} GB of memory, '
        f"of which {gigabytes[1]:.2f} GB before there was an image and {gigabytes[2]:.2f} GB are image and result."
    )


# ----------------------------------------------------------------------------------------------------------- report


def report(results: Row) -> str:
    """Markdown: facts, then a table for each folder of images."""
    tables = "\n\n".join(
        f"## {folder}, {rows[0]['pictures']} images\n\n{table(rows)}" for folder, rows in results["results"].items()
    )
    return f"""Made by `python -m examples.experiments.tiles.run`: {settings_text(results, "results")}.

PSNR in dB after rounding to 8 bits, per image, then averaged: to the untiled image of whole-image pooling (mean
and lowest), to the untiled image of the same pooling, to the clean image, and the last minus that of the untiled
image. Pooling: "tile" over each tile, "picture" by statistics gathered in passes before, "local" over windows (TLC).
Seconds are those of this machine as busy as it was.

{tables}
"""


def main(args: TilesArguments) -> None:
    """Measures the quality of all choices, or the memory of a large image, and writes the results."""
    if args.memory is not None:
        sizes(args.memory, "x", "--memory")
    list(choices(args))  # refuses wrong sizes before anything is made
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    facts = machine_facts(device(), "torch", "peft")
    del facts["python"]
    if args.memory is not None:
        row = in_fresh_process(memory_of, args)
        write_json(folder / f"{args.name}-memory-{args.memory}.json", {**facts, **row})
        print(memory_line(row))
        return
    facts["model_name_or_path"] = args.model_name_or_path or SHIPPED_NETWORK
    model = load(facts["model_name_or_path"], args.adapter).to(device()).eval()
    if args.adapter is not None:
        facts["adapter"] = Path(args.adapter).name
    results: dict[str, list[Row]] = {}
    for data in args.data:
        name = "/".join(Path(data).resolve().parts[-2:])
        for rows in measure(model, data, args):
            results[name] = rows
            print(f"\n{name}, {rows[0]['pictures']} images\n{table(rows)}", flush=True)
            save_results(folder, args.name, {**facts, "results": results}, report)


if __name__ == "__main__":
    run_script(main, TilesArguments)
