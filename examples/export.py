"""Exports a network, with an adapter merged into it, to one file for phones, cameras and other runtimes.

    python examples/export.py --adapter outputs/finetune

writes `outputs/finetune.onnx`, which takes images of any size; `--format torch_export` a .pt2 file for
`torch.export.load` and what builds on it. The file is run and compared with PyTorch before it is written. Needs
`pip install -e ".[export]"` for ONNX.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from colora_peft.export import EXPORT_SUFFIXES, ExportSettings, export_network
from colora_peft.hub import load_backbone, load_for_script
from colora_peft.utils import check_writable, flag, run_script


@dataclass
class ExportArguments:
    """Flags of the export."""

    adapter: str | None = flag(None, "Folder or Hub id of the adapter. Without it the bare network is exported.")
    model_name_or_path: str | None = flag(
        None,
        "The network: a folder, an id on the Hub, or module:function. Default: the one that the "
        "adapter says it was trained on, unless that is a function.",
    )
    output_file: str | None = flag(
        None, "Path of the file. Default: outputs/<name of the adapter, or of the network>.onnx or .pt2."
    )
    format: Literal["onnx", "torch_export"] = flag(
        "onnx", "onnx: for ONNX Runtime and others; torch_export: a .pt2 file."
    )
    height: int | None = flag(
        None, "Height in pixels of the one image that the file takes, with --width. Default: any size and number."
    )
    width: int | None = flag(None, "Width in pixels, with --height.")
    half_precision: bool = flag(False, "Weights and arithmetic in float16, half the file; images stay float32.")
    tolerance: float | None = flag(
        None, "Largest difference from PyTorch of a pixel in [0, 1]. Default: 1e-4, half precision 2e-2."
    )
    task: str | None = flag(None, "Purpose of the file, for its metadata. Default: the name of the adapter.")
    overwrite: bool = flag(False, "Replace --output_file if it is there.")

    def __post_init__(self) -> None:
        if self.adapter is None and self.model_name_or_path is None:
            raise ValueError("Nothing to export: give --adapter, --model_name_or_path, or both.")
        if (self.height is None) != (self.width is None):
            raise ValueError("--height and --width need each other: give both or none.")
        self.settings()  # refuses wrong values before anything is loaded
        if self.output_file is None:
            name = Path((self.adapter or self.model_name_or_path).replace(":", "-")).resolve().name
            self.output_file = str(Path("outputs") / f"{name}{EXPORT_SUFFIXES[self.format]}")

    def settings(self, **metadata: str) -> ExportSettings:
        size = None if self.height is None else (self.height, self.width)
        return ExportSettings(self.format, size, self.half_precision, self.tolerance, metadata)


def check_output_file(args: ExportArguments) -> None:
    """Refuses a file of another kind, or one that nobody asked to replace. Writes nothing."""
    path, suffix = Path(args.output_file), EXPORT_SUFFIXES[args.format]
    if path.suffix != suffix:
        raise ValueError(f"--output_file {path} does not end in {suffix}, as files of --format {args.format} do.")
    if path.is_dir():
        raise ValueError(f"--output_file {path} is a folder; name a file.")
    if path.exists() and not args.overwrite:
        raise ValueError(f"--output_file {path} is there already; add --overwrite to replace it.")
    check_writable(path.parent, "The folder of --output_file")


def load_merged(args: ExportArguments) -> tuple[torch.nn.Module, str]:
    """The network with the adapter merged into its weights, and the name of the network.

    Raises:
        OSError: There is no such adapter or network.
        ValueError: The adapter does not say what its base is, or is one of another base.
    """
    if args.adapter is None:
        return load_backbone(args.model_name_or_path), args.model_name_or_path
    model = load_for_script(args.adapter, base=args.model_name_or_path)
    base = args.model_name_or_path or model.peft_config["default"].base_model_name_or_path
    return model.merge_and_unload(safe_merge=True), base


def main(args: ExportArguments) -> None:
    check_output_file(args)
    network, base = load_merged(args)
    name = "none" if args.adapter is None else args.adapter
    task = args.task or ("none" if args.adapter is None else Path(args.adapter).resolve().name)
    path = Path(args.output_file)
    checks = export_network(network, path, args.settings(task=task, adapter=name, base=base))
    for check in checks:
        size = f"{check.batch} x {check.height} x {check.width}"
        print(f"{size:>14}: greatest difference to PyTorch {check.max_difference:.1e}")
    print(f"Saved in {path}, {path.stat().st_size / 1e6:.1f} MB.")


if __name__ == "__main__":
    run_script(main, ExportArguments)
