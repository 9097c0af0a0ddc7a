"""What Restormer's attention costs as it is written here, against the straightforward way, in one run.

    python examples/benchmark_restormer.py

Variants of the same network with the same weights: `frugal` as in models/restormer; `straightforward`, whose attention
normalises queries and keys, multiplies, takes the softmax and multiplies; `and gate` which besides leaves the gate of
the feed-forward network to autograd. Each takes full training steps. Time is that of the processor on a CPU, so that
other work on the machine counts little, and of the clock on a GPU; ratios are medians within rounds. Memory is the
growth of a fresh process over three steps, and the bytes that autograd keeps from the forward to the backward pass.
"""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmark_speed import peak_of, take_turns
from speed_variants import Mode, images, training_step
from torch import Tensor, nn
from transformers import HfArgumentParser

from colora_peft.hub import hardware_name
from colora_peft.models import RestormerConfig, RestormerForImageRestoration
from colora_peft.models.restormer.attention_restormer import ChannelAttention
from colora_peft.models.restormer.modeling_restormer import GatedFeedForward
from colora_peft.training import restoration_loss
from colora_peft.utils import write_json, write_text

VARIANTS = ("frugal", "straightforward", "and gate")
Row = dict[str, object]


@dataclass
class RestormerArguments:
    """Flags of the benchmark."""

    shapes: list[str] = field(
        default_factory=lambda: ["2x128", "1x256"], metadata={"help": "Training batches: images x side in pixels."}
    )
    width: int = field(default=48, metadata={"help": "Channels of the first level; 48 is the published network."})
    num_blocks: list[int] = field(
        default_factory=lambda: [4, 6, 6, 8], metadata={"help": "Blocks at each level; refinement has the first."}
    )
    rounds: int = field(default=4, metadata={"help": "Turns that each variant takes, after one that does not count."})
    memory_repeats: int = field(default=3, metadata={"help": "Fresh processes for the memory of each variant."})
    output_dir: str = field(
        default=str(Path(__file__).parent / "benchmark_results"), metadata={"help": "Where the results go."}
    )


# --------------------------------------------------------------------------------------------------------- variants


def straightforward_attention(layer: ChannelAttention, x: Tensor) -> Tensor:
    """What `layer` computes, written as the formula reads: (B, C, H, W) to the same shape."""
    batch, channels, height, width = x.shape
    queries, keys, values = (
        part.reshape(batch, layer.heads, channels // layer.heads, height * width)
        for part in layer.qkv_dwconv(layer.qkv(x)).chunk(3, dim=1)
    )
    queries, keys = F.normalize(queries, dim=-1), F.normalize(keys, dim=-1)
    attention = (queries @ keys.transpose(-1, -2) * layer.temperature).softmax(dim=-1)
    return layer.project_out((attention @ values).reshape(x.shape))


def straightforward_gate(layer: GatedFeedForward, x: Tensor) -> Tensor:
    left, right = layer.dwconv(layer.project_in(x)).chunk(2, dim=1)
    return layer.project_out(F.gelu(left) * right)


def make_network(variant: str, width: int, num_blocks: list[int]) -> nn.Module:
    """The network in channels_last, as it is trained; the same weights for every variant."""
    torch.manual_seed(0)
    config = RestormerConfig(width=width, num_blocks=num_blocks, num_refinement_blocks=num_blocks[0])
    network = RestormerForImageRestoration(config).to(memory_format=torch.channels_last)
    for module in network.modules():
        if isinstance(module, ChannelAttention) and variant != "frugal":
            module.forward = partial(straightforward_attention, module)
        if isinstance(module, GatedFeedForward) and variant == "and gate":
            module.forward = partial(straightforward_gate, module)
    return network


# ------------------------------------------------------------------------------------------------------ measurements


def timings(args: RestormerArguments, mode: Mode, shape: str) -> Iterator[Row]:
    batch = images(shape, mode.device)
    runs = {
        variant: training_step(make_network(variant, args.width, args.num_blocks).to(mode.device), mode, batch)
        for variant in VARIANTS
    }
    clock = time.process_time if mode.device == "cpu" else time.perf_counter
    seconds = take_turns(runs, args.rounds, mode.wait, clock)
    for variant, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds["straightforward"], strict=True)]
        yield {"mode": str(mode), "what": "training step", "shape": shape, "variant": variant,
               "seconds": statistics.median(own), "ratio": statistics.median(ratios)}  # fmt: skip


def take_steps(width: int, num_blocks: list[int], mode: Mode, shape: str, variant: str) -> None:
    step = training_step(make_network(variant, width, num_blocks).to(mode.device), mode, images(shape, mode.device))
    for _ in range(3):
        step()


def peak_memory(width: int, num_blocks: list[int], mode: Mode, shape: str, variant: str) -> int:
    """Bytes of three steps at their peak; to be called in a fresh process."""
    return peak_of(lambda: take_steps(width, num_blocks, mode, shape, variant), mode.device)


def kept_bytes(args: RestormerArguments, mode: Mode, shape: str, variant: str) -> int:
    """Bytes that autograd keeps from the forward to the backward pass, weights included, each storage once."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    network = make_network(variant, args.width, args.num_blocks).to(mode.device).train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), mode.autocast():
        loss = restoration_loss(network, images(shape, mode.device))
    del loss
    return sum(kept.values())


def memories(args: RestormerArguments, mode: Mode, shape: str) -> Iterator[Row]:
    peaks: dict[str, list[int]] = {variant: [] for variant in VARIANTS}
    for _ in range(args.memory_repeats):
        for variant in VARIANTS:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
                job = fresh.submit(peak_memory, args.width, args.num_blocks, mode, shape, variant)
                peaks[variant].append(job.result())
    figures = {
        "peak memory of a training step": {variant: statistics.median(own) for variant, own in peaks.items()},
        "kept for the backward pass": {variant: kept_bytes(args, mode, shape, variant) for variant in VARIANTS},
    }
    for what, bytes_of in figures.items():
        for variant, own in bytes_of.items():
            yield {"mode": str(mode), "what": what, "shape": shape, "variant": variant, "bytes": own,
                   "ratio": own / bytes_of["straightforward"]}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ report


def table(rows: Iterable[Row]) -> str:
    """Markdown: one line for each row, in the order in which they were measured."""
    lines = ["| mode | what | shape | variant | | to straightforward |", "|---" * 6 + "|"]
    for row in rows:
        amount = f"{row['seconds'] * 1e3:,.0f} ms" if "seconds" in row else f"{row['bytes'] / 1e6:,.1f} MB"
        cells = [row["mode"], row["what"], row["shape"], row["variant"], amount, f"{row['ratio']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def modes() -> list[Mode]:
    return [Mode("cpu")] + ([Mode("cuda"), Mode("cuda", bfloat16=True)] if torch.cuda.is_available() else [])


def main(args: RestormerArguments) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = {"hardware": hardware_name(device), "python": sys.version.split()[0], "torch": version("torch")}
    facts |= {key: value for key, value in asdict(args).items() if key != "output_dir"}
    rows = []
    for mode in modes():
        for shape in args.shapes:
            for measure in (timings, memories):
                for row in measure(args, mode, shape):
                    rows.append(row)
                    print(table([row]).splitlines()[-1], flush=True)
    name = re.sub(r"[^a-z0-9.]+", "-", f"restormer {facts['hardware']} torch{facts['torch']}".lower()).strip("-")
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", {**facts, "rows": rows})
    settings = ", ".join(f"{key} {value}" for key, value in facts.items())
    write_text(
        folder / f"{name}.md", f"Made by `python examples/benchmark_restormer.py`: {settings}.\n\n{table(rows)}\n"
    )


if __name__ == "__main__":
    try:
        main(HfArgumentParser(RestormerArguments).parse_args_into_dataclasses()[0])
    except ValueError as error:
        sys.exit(f"benchmark_restormer.py: {error}")
