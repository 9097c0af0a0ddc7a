"""When the gradients of a delta's factors are faster than that of the whole weight: layer by layer, on the CPU.

    python examples/measure_factors.py

Forward and backward pass of one layer with its adapter, as in training: by `run_with_factors`, and by building the
weight and leaving the rest to autograd. The rule of `colora_peft.tuner.factors_save_time` was read from such a
table; the last column says what the rule does.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from benchmark_speed import take_turns
from torch import Tensor, nn
from transformers import HfArgumentParser

from colora_peft.hub import hardware_name
from colora_peft.tuner import factors_save_time, run_with_factors, run_with_weight
from colora_peft.utils import write_text


@dataclass
class FactorArguments:
    """Flags of the measurement."""

    channels: list[int] = field(default_factory=lambda: [32, 64, 128, 256, 512], metadata={"help": "In and out."})
    sides: list[int] = field(default_factory=lambda: [8, 16, 32, 64, 128], metadata={"help": "Of the feature map."})
    batch_size: int = field(default=4, metadata={"help": "Images, or sequences of side * side tokens."})
    rank_share: float = field(default=0.07, metadata={"help": "Share of the layer's weights, at least rank 1."})
    rounds: int = field(default=15, metadata={"help": "Turns that each way takes, after one that does not count."})
    max_multiplications: float = field(default=4e9, metadata={"help": "Of the gradient of the whole weight."})
    output_dir: str = field(
        default=str(Path(__file__).parent / "benchmark_results"), metadata={"help": "Where the table goes."}
    )


def make_layer(kind: str, channels: int) -> nn.Module:
    if kind == "Linear":
        return nn.Linear(channels, channels)
    size = int(kind[-1])
    return nn.Conv2d(channels, channels, size, padding=size // 2).to(memory_format=torch.channels_last)


def make_input(layer: nn.Module, channels: int, side: int, batch_size: int) -> Tensor:
    x = torch.randn(batch_size, channels, side, side).contiguous(memory_format=torch.channels_last)
    return (x.permute(0, 2, 3, 1) if isinstance(layer, nn.Linear) else x).requires_grad_()


def ways(layer: nn.Module, rank: int, x: Tensor) -> dict[str, Callable[[], None]]:
    """The forward and backward pass of either way, for the same layer, factors and input."""
    weight = layer.requires_grad_(False).weight
    up = torch.randn(len(weight), rank).requires_grad_()
    down = torch.randn(rank, weight[0].numel()).requires_grad_()
    tensors = (x, up, down)
    output_gradient = torch.randn_like(run_with_weight(layer, weight, x).detach())

    def by_weight() -> None:
        output = run_with_weight(layer, weight + (up @ down).view(weight.shape), x)
        torch.autograd.grad(output, tensors, output_gradient)

    def by_factors() -> None:
        torch.autograd.grad(run_with_factors(layer, up, down, x), tensors, output_gradient)

    return {"weight": by_weight, "factors": by_factors}


def measure(args: FactorArguments) -> Iterator[str]:
    """One line of Markdown for each kind of layer, number of channels and side."""
    for kind in ("Conv2d 1", "Conv2d 3", "Linear"):
        for channels in args.channels:
            layer = make_layer(kind, channels)
            d, k = channels, layer.weight.numel() // channels
            rank = max(round(args.rank_share * d * k / (d + k)), 1)
            for side in args.sides:
                multiplications = args.batch_size * side * side * d * k
                if multiplications > args.max_multiplications:
                    continue
                x = make_input(layer, channels, side, args.batch_size)
                seconds = take_turns(ways(layer, rank, x), args.rounds, lambda: None)
                ratio = statistics.median(
                    factors / weight for factors, weight in zip(seconds["factors"], seconds["weight"], strict=True)
                )
                rule = "factors" if factors_save_time(layer, rank, x) else "weight"
                yield (
                    f"| {kind} | {channels} | {rank} | {side} | {multiplications / 1e6:,.0f} "
                    f"| {statistics.median(seconds['weight']) * 1e3:.2f} ms | {ratio:.2f} | {rule} |"
                )


def main(args: FactorArguments) -> None:
    lines = [
        "| layer | channels | rank | side | million multiplications | weight | factors / weight | rule takes |",
        "|---" * 8 + "|",
    ]
    for line in measure(args):
        print(line, flush=True)
        lines.append(line)
    hardware = f"{hardware_name(torch.device('cpu'))}, torch {torch.__version__}"
    title = f"Made by `python examples/measure_factors.py` on {hardware}: forward and backward pass of one layer.\n\n"
    write_text(Path(args.output_dir) / "factors_cpu.md", title + "\n".join(lines) + "\n")


if __name__ == "__main__":
    try:
        main(HfArgumentParser(FactorArguments).parse_args_into_dataclasses()[0])
    except ValueError as error:
        sys.exit(f"measure_factors.py: {error}")
