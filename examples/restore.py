"""Restore images with a network and adapters.

    python examples/restore.py --input photo.jpg folder "more/**/*.tif" --adapter outputs/finetune

Folders are searched with all below them. Results are files of the same kind under the same names in --output_dir, with
EXIF, colour profile, transparency and 16 bits kept where the format holds them (colora_peft/images/image_file.py says
what else is decided). A run that was interrupted goes on where it was: results that are there are kept.

Several adapters, with the bare network ("none") beside them, side by side and measured against targets:

    python examples/restore.py --input test/input --targets test/target --adapter none outputs/a outputs/b --compare

The exit code is 1 if an image failed; the others are written all the same.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from restore_report import Row, Table, report_of
from restore_run import RestoreRun
from safetensors import SafetensorError
from torch import nn
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

from colora_peft.hub import load_backbone, load_base
from colora_peft.images import DEFAULT_MAX_PIXELS
from colora_peft.inference import Pooling, check_tile, tile_multiple
from colora_peft.restore import NO_ADAPTER, AdapterSet, RestoreRecord, adapter_labels, plan_jobs
from colora_peft.utils import check_at_least, write_json

SUMMARY_FILE = "summary.json"
SHIPPED_NETWORK = str(Path(__file__).resolve().parent / "checkpoints" / "nafnet-small-prod")


@dataclass
class RestoreArguments:
    """Flags of the restoration."""

    input: list[str] = field(
        metadata={"help": "Images, folders (with all below them) and patterns such as 'photos/**/*.png'."}
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The network: a folder, an id on the Hub, or module:function that returns it. Default: the "
                  "base that the (first) adapter names; without adapter the network that comes with the examples."},
    )  # fmt: skip
    adapter: list[str] | None = field(
        default=None,
        metadata={"help": "Adapters, folders or ids on the Hub; 'none' is the network without one. With several, each "
                  "has a folder below --output_dir. Default: none."},
    )  # fmt: skip
    output_dir: str = field(default="outputs/restored", metadata={"help": "Folder for the results."})
    targets: str | None = field(
        default=None,
        metadata={"help": "Folder of clean images of the same names (any suffix): PSNR and SSIM, in RGB after "
                  "rounding to 8 bits, of the files as they are written, so with JPEG's losses. Borders are extended "
                  "and tiles laid as restore_image does, so that on images that the network must pad the figures "
                  "may differ a little from those of finetune.py."},
    )  # fmt: skip
    compare: bool = field(
        default=False,
        metadata={"help": "Also write input | restored (| target) side by side, in comparisons/ below --output_dir."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Make results anew that are there. Default: keep them."})
    tile: int = field(
        default=512,
        metadata={"help": "Side in pixels of the tiles that bound the memory. 0: the whole image at once."},
    )
    overlap: int = field(default=64, metadata={"help": "Pixels that neighbouring tiles share, at least."})
    batch_size: int = field(default=1, metadata={"help": "Tiles that go through the network together."})
    pooling: Pooling = field(
        default="picture",
        metadata={"help": "What layers that average over all they see are given where there are several tiles: the "
                  "mean over the image, over their tile, or (local) over windows of --pooling_window."},
    )  # fmt: skip
    pooling_window: int | None = field(
        default=None, metadata={"help": "Side in pixels of the windows of --pooling local."}
    )
    statistics_passes: int = field(
        default=2,
        metadata={"help": "Passes over the tiles that gather the means of --pooling image, each as long as the one "
                  "that restores."},
    )  # fmt: skip
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Precision of the computation; half is faster on GPUs."}
    )
    self_ensemble: bool = field(
        default=False,
        metadata={"help": "Mean over the eight flips and rotations: a little better, eight times slower."},
    )
    format: Literal["same", "png", "tiff", "jpeg", "webp"] = field(
        default="same", metadata={"help": "Kind of the result files. same: each as its input."}
    )
    quality: int = field(
        default=95, metadata={"help": "Of JPEG (4:4:4) and WebP, 1 to 100. An exact WebP stays exact."}
    )
    grey_as_rgb: bool = field(
        default=False, metadata={"help": "Write grey images in colour, for networks that colour them."}
    )
    max_pixels: int = field(
        default=DEFAULT_MAX_PIXELS, metadata={"help": "Larger images are refused: a guard against bombs."}
    )
    device: str | None = field(
        default=None, metadata={"help": "Such as cpu, cuda, cuda:1 or mps. Default: the accelerator if there is one."}
    )

    def __post_init__(self) -> None:
        check_at_least(self, "tile", 0)
        check_at_least(self, "overlap", 0)
        for name in ("max_pixels", "batch_size", "statistics_passes"):
            check_at_least(self, name, 1)
        if (self.pooling == "local") != (self.pooling_window is not None):
            raise ValueError("--pooling local and --pooling_window go together: give both or neither.")
        if self.pooling_window is not None:
            check_at_least(self, "pooling_window", 1)
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality must be between 1 and 100, got {self.quality}.")

    def settings(self) -> dict[str, object]:
        """What decides the pixels of a result, besides the input and the weights."""
        names = ("tile", "overlap", "batch_size", "pooling", "pooling_window", "statistics_passes", "dtype")
        names += ("self_ensemble", "quality", "grey_as_rgb")
        return {name: getattr(self, name) for name in names}


def device_of(args: RestoreArguments) -> torch.device:
    if args.device is not None:
        try:
            return torch.empty(0, device=args.device).device
        # PyTorch has many errors for a device that is not there.
        except Exception as error:
            raise ValueError(f"--device {args.device} cannot be used: {error}") from error
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def network_of(args: RestoreArguments, adapters: Sequence[str]) -> nn.Module:
    """The network to restore with, as --model_name_or_path or else the first adapter names it."""
    if args.model_name_or_path is not None:
        return load_backbone(args.model_name_or_path)
    first = next((adapter for adapter in adapters if adapter != NO_ADAPTER), None)
    if first is None:
        return load_backbone(SHIPPED_NETWORK)
    try:
        return load_base(first)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{error} (Without --model_name_or_path the adapter says which network it is for.)"
        ) from error


def main(args: RestoreArguments) -> int:
    """Restore, and return the exit code."""
    adapters = args.adapter or [NO_ADAPTER]
    labels = adapter_labels(adapters)
    output_dir, file_format = Path(args.output_dir), None if args.format == "same" else args.format
    jobs = plan_jobs(args.input, output_dir, labels if len(labels) > 1 else [""], file_format, args.targets)
    device = device_of(args)
    transformers_logging.disable_progress_bar()
    # Loading an adapter, PEFT asks transformers for what it has renamed.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    network = network_of(args, adapters).to(device)
    if args.tile:  # now, not with the first image that has several tiles
        check_tile(args.tile, args.overlap, tile_multiple(network))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    run = RestoreRun(AdapterSet(network, dict(zip(labels, adapters, strict=True))), RestoreRecord(output_dir), args)
    run.check_kept(jobs)
    adapted = f"{'adapter' if len(labels) == 1 else 'adapters'} {', '.join(labels)}"
    used = f"{type(network).__name__} of {parameters / 1e6:.1f} M parameters, {adapted}"
    print(f"{len(jobs)} {'image' if len(jobs) == 1 else 'images'}, {used}, on {device}.\n")

    table = Table([job.name for job in jobs], labels, with_figures=args.targets is not None)
    print(table.head())
    rows: list[Row] = []
    interrupted = False
    try:
        for job in jobs:
            for row in run.process(job):
                rows.append(row)
                print(table.line(row), flush=True)
    except KeyboardInterrupt:
        interrupted = True
    print(table.ending(rows, output_dir, total=len(jobs) * len(labels)))
    if output_dir.is_dir():
        write_json(output_dir / SUMMARY_FILE, report_of(rows, args.settings()))
    return 130 if interrupted else int(any(row.error for row in rows))


if __name__ == "__main__":
    try:
        (parsed,) = HfArgumentParser(RestoreArguments).parse_args_into_dataclasses()
        code = main(parsed)
    except (ValueError, TypeError, OSError, ImportError, SafetensorError) as error:
        sys.exit(f"restore.py: {error}")
    sys.exit(code)
