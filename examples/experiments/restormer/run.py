"""Time and memory of Restormer's attention as it is written here, compared with the straightforward way.

    python -m examples.experiments.restormer.run

Variants of the same network with the same weights: `frugal` as in models/restormer; `straightforward`, whose attention
normalises queries and keys, multiplies, takes the softmax and multiplies; `and gate`, which also leaves the gate of
the feed-forward network to autograd. Each takes full training steps. Time is that of the processor on a CPU, so that
other work on the machine counts little, and of the clock on a GPU; ratios are medians within rounds. Memory is the
growth of a fresh process over three steps, and the bytes that autograd keeps for the backward pass.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colora_peft.models import RestormerConfig, RestormerForImageRestoration
from colora_peft.models.restormer.attention_restormer import ChannelAttention
from colora_peft.models.restormer.modeling_restormer import GatedFeedForward
from colora_peft.training import restoration_loss
from colora_peft.utils import flag, run_script
from examples.experiments.measure import (
    Row,
    device,
    machine_facts,
    machine_name,
    median_ratio,
    peak_memories,
    save_results,
    settings_text,
    shown,
    take_turns,
)
from examples.experiments.speed.variants import Mode, images, modes, take_steps, training_step
from examples.experiments.tables import markdown_table

VARIANTS = ("frugal", "straightforward", "and gate")


@dataclass
class RestormerArguments:
    """Flags of the measurement."""

    shapes: list[str] = flag(factory=lambda: ["2x128", "1x256"], help="Training batches: images x side in pixels.")
    width: int = flag(48, "Number of channels of the first level; 48 is the published network.")
    num_blocks: list[int] = flag(
        factory=lambda: [4, 6, 6, 8], help="Numbers of blocks at each level; refinement has the first."
    )
    rounds: int = flag(4, "Number of turns that each variant takes, after one that does not count.")
    memory_repeats: int = flag(3, "Number of fresh processes in which each variant's memory is taken.")
    output_dir: str = flag(str(Path(__file__).parent), "Folder for the results.")


# --------------------------------------------------------------------------------------------------------- variants


def straightforward_attention(layer: ChannelAttention, x: Tensor) -> Tensor:
    """The function of `layer`, written as the formula reads: (B, C, H, W) to the same shape."""
    batch, channels, height, width = x.shape
    queries, keys, values = (
        part.reshape(batch, layer.heads, channels // layer.heads, height * width)
        for part in layer.qkv_dwconv(layer.qkv(x)).chunk(3, dim=1)
    )
    queries, keys = F.normalize(queries, dim=-1), F.normalize(keys, dim=-1)
    attention = (queries @ keys.transpose(-1, -2) * layer.temperature).softmax(dim=-1)
    return layer.project_out((attention @ values).reshape(x.shape))


def straightforward_gate(layer: GatedFeedForward, x: Tensor) -> Tensor:
    """The function of `layer`, left to autograd."""
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
    """Rows of the time of a training step."""
    batch = images(shape, mode.device)
    runs = {
        variant: training_step(make_network(variant, args.width, args.num_blocks).to(mode.device), mode, batch)
        for variant in VARIANTS
    }
    clock = time.process_time if mode.device == "cpu" else time.perf_counter
    seconds = take_turns(runs, args.rounds, mode.wait, clock)
    for variant, own in seconds.items():
        yield {"mode": str(mode), "what": "training step", "shape": shape, "variant": variant,
               "seconds": statistics.median(own), "ratio": median_ratio(own, seconds["straightforward"])}  # fmt: skip


def make_and_take_steps(variant: str, args: RestormerArguments, mode: Mode, shape: str) -> None:
    """Makes a variant and takes three training steps."""
    take_steps(make_network(variant, args.width, args.num_blocks).to(mode.device), mode, shape)


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
    """Rows of the memory of a training step."""
    arguments = {variant: (variant, args, mode, shape) for variant in VARIANTS}
    figures = {
        "peak memory of a training step": peak_memories(
            mode.device, make_and_take_steps, arguments, args.memory_repeats
        ),
        "kept for the backward pass": {variant: kept_bytes(args, mode, shape, variant) for variant in VARIANTS},
    }
    for what, bytes_of in figures.items():
        for variant, own in bytes_of.items():
            yield {"mode": str(mode), "what": what, "shape": shape, "variant": variant, "bytes": own,
                   "ratio": own / bytes_of["straightforward"]}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- report


def line(row: Row) -> list[str]:
    """Cells of a line of the table."""
    amount = f"{row['seconds'] * 1e3:,.0f} ms" if "seconds" in row else f"{row['bytes'] / 1e6:,.1f} MB"
    return [row["mode"], row["what"], row["shape"], row["variant"], amount, f"{row['ratio']:.3f}"]


def report(results: Row) -> str:
    """Markdown: facts and flags, then a line for each row in the order in which they were measured."""
    heads = ["mode", "what", "shape", "variant", "", "to straightforward"]
    table = markdown_table(heads, map(line, results["rows"]))
    return f"Made by `python -m examples.experiments.restormer.run`: {settings_text(results, 'rows')}.\n\n{table}\n"


def measure(args: RestormerArguments) -> Iterator[Row]:
    """All rows."""
    for mode in modes():
        for shape in args.shapes if not mode.compiled else ():
            yield from timings(args, mode, shape)
            yield from memories(args, mode, shape)


def main(args: RestormerArguments) -> None:
    """Measures and writes the results."""
    facts = machine_facts(device(), "torch") | asdict(args)
    del facts["output_dir"]
    save_results(args.output_dir, machine_name(facts), {**facts, "rows": shown(measure(args), line)}, report)


if __name__ == "__main__":
    run_script(main, RestormerArguments)
