"""Time and memory of CoLoRA, of PEFT's LoRA at the same ranks, and of full tuning.

    python -m examples.experiments.speed.run

Runs on the CPU, and on the GPU if there is one (float32, bfloat16 autocast, and both compiled). All variants of a
measurement take turns within one run, because machines are noisy: a ratio is the median, over the rounds, of the ratio
within a round. Results go to one JSON file for each kind of hardware, with its tables beside it.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

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
from examples.experiments.speed.variants import (
    INFERRED,
    TRAINED,
    Mode,
    images,
    inference,
    make_network,
    make_variant,
    modes,
    take_steps,
    training_step,
)
from examples.experiments.tables import markdown_table


@dataclass
class SpeedArguments:
    """Flags of the measurement."""

    networks: list[str] = flag(factory=lambda: ["nafnet", "cnn"], help="Networks to measure: nafnet, cnn.")
    train_shapes: list[str] = flag(
        factory=lambda: ["2x256", "4x128"], help="Training batches: images x side in pixels."
    )
    inference_shapes: list[str] = flag(
        factory=lambda: ["2x256", "2x64"], help="Batches of inference: images x side in pixels."
    )
    rounds: int = flag(4, "Number of turns that each variant takes, after one that does not count.")
    repeats: int = flag(2, "Number of times that the networks are made again: their place in memory matters.")
    memory_repeats: int = flag(3, "Number of fresh processes in which each variant's memory is taken.")
    parameter_budget: float = flag(0.07, "Share of the weights, the same in every layer.")
    output_dir: str = flag(str(Path(__file__).parent), "Folder for the results.")


# --------------------------------------------------------------------------------------------------- time and memory


def timings(args: SpeedArguments, network_name: str, mode: Mode, what: str, shape: str) -> Iterator[Row]:
    """Rows of one measurement: `training step` or `inference`."""
    variants, make_run, reference = (
        ((*TRAINED, "floor"), training_step, "full")
        if what == "training step"
        else (INFERRED + (("colora pinned",) if mode.compiled else ()), inference, "bare")
    )
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(args.repeats):
        torch._dynamo.reset()
        network, batch, runs = make_network(network_name), images(shape, mode.device), {}
        for variant in variants:
            trained = "colora trainable" if (variant, what) == ("colora", "training step") else variant
            model = make_variant(network, trained, args.parameter_budget).to(mode.device)
            runs[variant] = make_run(torch.compile(model) if mode.compiled else model, mode, batch)
        for variant, own in take_turns(runs, args.rounds, mode.wait).items():
            seconds[variant] += own
    for variant, own in seconds.items():
        ratios = {f"ratio_to_{other}": median_ratio(own, seconds[other]) for other in (reference, "lora")}
        yield {"network": network_name, "mode": str(mode), "what": what, "shape": shape, "variant": variant,
               "seconds": statistics.median(own), **ratios}  # fmt: skip


def adapt_and_take_steps(network_name: str, mode: Mode, shape: str, variant: str, parameter_budget: float) -> None:
    """Makes a variant and takes three training steps, weights and Adam's moments included."""
    network = make_network(network_name)
    model = make_variant(network, variant, parameter_budget).to(mode.device)
    del network
    gc.collect()
    take_steps(torch.compile(model) if mode.compiled else model, mode, shape)


def memories(args: SpeedArguments, network_name: str, mode: Mode, shape: str) -> Iterator[Row]:
    """Rows of the peak memory of training."""
    trained = {variant: "colora trainable" if variant == "colora" else variant for variant in TRAINED}
    arguments = {v: (network_name, mode, shape, name, args.parameter_budget) for v, name in trained.items()}
    bytes_of = peak_memories(mode.device, adapt_and_take_steps, arguments, args.memory_repeats)
    for variant, peak in bytes_of.items():
        ratios = {f"ratio_to_{other}": peak / bytes_of[other] for other in ("full", "lora")}
        yield {"network": network_name, "mode": str(mode), "what": "peak memory of a training step", "shape": shape,
               "variant": variant, "bytes": peak, **ratios}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- report


def line(row: Row) -> list[str]:
    """Cells of a line of the table."""
    amount = f"{row['seconds'] * 1e3:,.1f} ms" if "seconds" in row else f"{row['bytes'] / 1e6:,.1f} MB"
    ratios = [row.get("ratio_to_full", row.get("ratio_to_bare")), row.get("ratio_to_lora")]
    names = [row.get(name, "") for name in ("network", "mode", "what", "shape", "variant")]
    return [*names, amount, *("" if ratio is None else f"{ratio:.3f}" for ratio in ratios)]


def report(results: Row) -> str:
    """Markdown: facts and flags, then a line for each row in the order in which they were measured."""
    heads = ["network", "mode", "what", "shape", "variant", "", "to full / bare", "to LoRA"]
    facts = settings_text(results, "rows")
    table = markdown_table(heads, map(line, results["rows"]))
    return f"Made by `python -m examples.experiments.speed.run`: {facts}.\n\n{table}\n"


def measure(args: SpeedArguments) -> Iterator[Row]:
    """All rows."""
    for network_name in args.networks:
        for mode in modes():
            for what, shapes in (("training step", args.train_shapes), ("inference", args.inference_shapes)):
                for shape in shapes:
                    yield from timings(args, network_name, mode, what, shape)
            yield from memories(args, network_name, mode, args.train_shapes[0])


def main(args: SpeedArguments) -> None:
    """Measures and writes the results."""
    facts = {**machine_facts(device(), "torch", "peft", "colora-peft"), **asdict(args)}
    del facts["output_dir"]
    save_results(args.output_dir, machine_name(facts), {**facts, "rows": shown(measure(args), line)}, report)


if __name__ == "__main__":
    run_script(main, SpeedArguments)
