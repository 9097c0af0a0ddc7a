"""The program of `colora-restore`, `python -m colora_peft.restore` and examples/restore.py."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from colora_peft.hub import BY_FLAG, BY_OTHER_FLAG, Asking, load_backbone, load_base
from colora_peft.images import left_out_in_words
from colora_peft.inference import check_tile, tile_multiple
from colora_peft.utils import check_writable, default_device, run_script, write_json

from .adapters import NO_ADAPTER, AdapterSet, adapter_labels
from .arguments import RestoreArguments
from .plan import plan_jobs
from .record import RestoreRecord
from .report import Row, Table, report_of
from .run import RestoreRun

SUMMARY_FILE = "summary.json"


def device_of(args: RestoreArguments) -> torch.device:
    """The device of --device, which is tried.

    Raises:
        ValueError: it cannot be used.
    """
    if args.device is None:
        return default_device()
    try:
        return torch.empty(0, device=args.device).device
    # PyTorch has many errors for a device that is not there.
    except Exception as error:
        raise ValueError(f"--device {args.device} cannot be used: {error}") from error


def network_of(args: RestoreArguments, adapters: Sequence[str], default: str | None) -> nn.Module:
    """The network to restore with, as --model_name_or_path or else the first adapter names it.

    Raises:
        ValueError: Neither is given and there is no default, or the network cannot be loaded.
    """
    if args.model_name_or_path is not None:
        return load_backbone(args.model_name_or_path)
    first = next((adapter for adapter in adapters if adapter != NO_ADAPTER), None)
    if first is None:
        if default is None:
            raise ValueError(
                "There is no network: give --adapter, which says what it is for, or --model_name_or_path."
            )
        return load_backbone(default)
    return load_base(first)


def asking_for_network(args: RestoreArguments) -> Asking:
    """The words that ask for another network, where that of `network_of` is not the base of an adapter."""
    if args.model_name_or_path is not None:
        return BY_OTHER_FLAG
    if len(args.adapter or ()) < 2:
        return BY_FLAG
    return replace(BY_FLAG, instead="Adapters of different networks need a run each, with an --output_dir of its own.")


def restore_images(args: RestoreArguments, default_network: str | None = None) -> int:
    """Restores all images and returns the exit code.

    Args:
        args: The flags.
        default_network: Network where the flags name neither a network nor an adapter.

    Raises:
        ValueError: What the flags ask for cannot be done; nothing was written.
        OSError: A network or an adapter cannot be read.
    """
    if not args.input:
        raise ValueError("There is nothing to restore: name images, folders or patterns first, then the flags.")
    adapters = args.adapter or [NO_ADAPTER]
    labels = adapter_labels(adapters)
    output_dir, file_format = Path(args.output_dir), None if args.format == "same" else args.format
    patterns = args.input_pattern, args.target_pattern
    subfolders, left_out = labels if len(labels) > 1 else [""], Counter[str]()
    jobs = plan_jobs(args.input, output_dir, subfolders, file_format, args.targets, patterns, left_out)
    check_writable(output_dir)
    device = device_of(args)
    transformers_logging.disable_progress_bar()
    # Loading an adapter, PEFT asks transformers for what it has renamed.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    network = network_of(args, adapters, default_network).to(device)
    if args.tile:  # now, not with the first image that has several tiles
        check_tile(args.tile, args.overlap, tile_multiple(network))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    adapter_set = AdapterSet(network, dict(zip(labels, adapters, strict=True)), asking_for_network(args))
    run = RestoreRun(adapter_set, RestoreRecord(output_dir), args)
    run.check_kept(jobs)
    adapted = f"{'adapter' if len(labels) == 1 else 'adapters'} {', '.join(labels)}"
    used = f"{type(network).__name__} of {parameters / 1e6:.1f} M parameters, {adapted}"
    print(f"{len(jobs)} {'image' if len(jobs) == 1 else 'images'}, {used}, on {device}.")
    if left_out:
        print(left_out_in_words(left_out))
    print()

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


def run_command() -> None:
    """Runs the program by the command line of this process, and ends it."""
    run_script(restore_images, RestoreArguments, words="input")
