"""When do gradients of the factors take less time than those of the whole weight? Measured on the CPU.

    python -m examples.experiments.speed.factors

Forward and backward pass of one layer with its adapter, as in training: by `run_with_factors`, and by building the
weight and leaving the rest to autograd. The rule of `colora_peft.tuner.factors_save_time` was read from such a table;
the last column shows the choice of the rule.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from colora_peft.hub import hardware_name
from colora_peft.tuner import factors_save_time, run_with_factors, run_with_weight
from colora_peft.utils import flag, run_script, write_text
from examples.experiments.measure import median_ratio, shown, take_turns
from examples.experiments.tables import markdown_table


@dataclass
class FactorArguments:
    """Flags of the measurement."""

    channels: list[int] = flag(factory=lambda: [32, 64, 128, 256, 512], help="Numbers of channels, in and out.")
    sides: list[int] = flag(factory=lambda: [8, 16, 32, 64, 128], help="Sides of the feature map in pixels.")
    batch_size: int = flag(4, "Number of images, or of sequences of side * side tokens.")
    rank_share: float = flag(0.07, "Share of the layer's weights, at least rank 1.")
    rounds: int = flag(15, "Number of turns that each way takes, after one that does not count.")
    max_multiplications: float = flag(4e9, "Largest number of multiplications for the gradient of the whole weight.")
    output_dir: str = flag(str(Path(__file__).parent), "Folder for the table.")


def make_layer(kind: str, channels: int) -> nn.Module:
    """A linear layer, or a convolution with the kernel size at the end of `kind`."""
    if kind == "Linear":
        return nn.Linear(channels, channels)
    size = int(kind[-1])
    return nn.Conv2d(channels, channels, size, padding=size // 2).to(memory_format=torch.channels_last)


def make_input(layer: nn.Module, channels: int, side: int, batch_size: int) -> Tensor:
    """Noise that requires a gradient."""
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


def measure(args: FactorArguments) -> Iterator[list[str]]:
    """Cells of a line for each kind of layer, number of channels and side."""
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
                seconds = take_turns(ways(layer, rank, x), args.rounds)
                ratio = median_ratio(seconds["factors"], seconds["weight"])
                milliseconds = statistics.median(seconds["weight"]) * 1e3
                rule = "factors" if factors_save_time(layer, rank, x) else "weight"
                sizes = [kind, str(channels), str(rank), str(side), f"{multiplications / 1e6:,.0f}"]
                yield [*sizes, f"{milliseconds:.2f} ms", f"{ratio:.2f}", rule]


def main(args: FactorArguments) -> None:
    """Measures and writes the table."""
    rows = shown(measure(args), list)
    heads = ["layer", "channels", "rank", "side", "million multiplications", "weight", "factors / weight", "rule"]
    hardware = f"{hardware_name(torch.device('cpu'))}, torch {torch.__version__}"
    title = f"Made by `python -m examples.experiments.speed.factors` on {hardware}: both passes of one layer."
    write_text(Path(args.output_dir) / "factors.md", f"{title}\n\n{markdown_table(heads, rows)}\n")


if __name__ == "__main__":
    run_script(main, FactorArguments)
