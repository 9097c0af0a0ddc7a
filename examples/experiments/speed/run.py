"""What an adapter costs: time, memory and disk of CoLoRA, of PEFT's LoRA at the same ranks, and of full tuning.

    python examples/benchmark_speed.py

Runs on the CPU, and on the GPU if there is one (float32, bfloat16 autocast, and both compiled). All variants of a
measurement take turns within one run, because machines are noisy: a ratio is the median, over the rounds, of the ratio
within a round. Results go to one JSON file for each kind of hardware, with its tables beside it.
"""

from __future__ import annotations

import copy
import gc
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import psutil
import torch
from peft import PeftModel
from speed_variants import (
    INFERRED,
    TRAINED,
    Mode,
    images,
    inference,
    make_network,
    make_variant,
    modes,
    training_step,
)
from transformers import HfArgumentParser

from colora_peft import hotswap_adapter, prepare_model_for_compiled_hotswap
from colora_peft.hub import hardware_name
from colora_peft.utils import write_json, write_text

Row = dict[str, object]


@dataclass
class SpeedArguments:
    """Flags of the benchmark."""

    networks: list[str] = field(default_factory=lambda: ["nafnet", "cnn"], metadata={"help": "nafnet, cnn."})
    train_shapes: list[str] = field(
        default_factory=lambda: ["2x256", "4x128"],
        metadata={"help": "Training batches: images x side in pixels."},
    )
    inference_shapes: list[str] = field(default_factory=lambda: ["2x256", "2x64"], metadata={"help": "Of inference."})
    rounds: int = field(default=4, metadata={"help": "Turns that each variant takes, after one that does not count."})
    repeats: int = field(
        default=2, metadata={"help": "Times that the networks are made anew: where they lie in memory matters, too."}
    )
    memory_repeats: int = field(
        default=3, metadata={"help": "Fresh processes in which each variant's memory is taken."}
    )
    parameter_budget: float = field(default=0.07, metadata={"help": "Share of the weights, the same in every layer."})
    output_dir: str = field(
        default=str(Path(__file__).parent / "benchmark_results"), metadata={"help": "Where the results go."}
    )


# ------------------------------------------------------------------------------------------------------------- time


def take_turns(
    runs: dict[str, Callable[[], None]],
    rounds: int,
    wait: Callable[[], None],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each run in each round; every other round goes backwards, so that no place is the better one."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in list(runs) if number % 2 else list(runs)[::-1]:
            wait()
            start = clock()
            runs[name]()
            wait()
            if number:  # the first round warms up
                seconds[name].append(clock() - start)
    return seconds


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
        ratios = {
            f"ratio_to_{other}": statistics.median(a / b for a, b in zip(own, seconds[other], strict=True))
            for other in (reference, "lora")
        }
        median = statistics.median(own)
        yield {"network": network_name, "mode": str(mode), "what": what, "shape": shape, "variant": variant,
               "seconds": median, **ratios}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- memory


def peak_memory(network_name: str, mode: Mode, shape: str, variant: str, parameter_budget: float) -> int:
    """Bytes that three training steps take at their peak, weights and Adam's moments included.

    To be called in a fresh process: on the CPU it is the growth of the process since before the network was made.
    """
    return peak_of(lambda: _take_steps(network_name, mode, shape, variant, parameter_budget), mode.device)


def peak_of(run: Callable[[], None], device: str) -> int:
    """Bytes that `run` takes at its peak, in a fresh process."""
    if device == "cuda":
        run()
        return torch.cuda.max_memory_allocated()
    process, peaks, done = psutil.Process(), [0], threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.001):
            peaks[0] = max(peaks[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return peaks[0] - before


def _take_steps(network_name: str, mode: Mode, shape: str, variant: str, parameter_budget: float) -> None:
    network = make_network(network_name)
    model = make_variant(network, variant, parameter_budget).to(mode.device)
    del network
    gc.collect()
    step = training_step(torch.compile(model) if mode.compiled else model, mode, images(shape, mode.device))
    for _ in range(3):
        step()


def memories(args: SpeedArguments, network_name: str, mode: Mode, shape: str) -> Iterator[Row]:
    """Rows of peak memory: the median over fresh processes for each variant."""
    peaks: dict[str, list[int]] = {variant: [] for variant in TRAINED}
    for _ in range(args.memory_repeats):
        for variant in TRAINED:
            trained = "colora trainable" if variant == "colora" else variant
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
                job = fresh.submit(peak_memory, network_name, mode, shape, trained, args.parameter_budget)
                peaks[variant].append(job.result())
    bytes_of = {variant: statistics.median(own) for variant, own in peaks.items()}
    for variant, peak in bytes_of.items():
        ratios = {f"ratio_to_{other}": peak / bytes_of[other] for other in ("full", "lora")}
        yield {"network": network_name, "mode": str(mode), "what": "peak memory of a training step", "shape": shape,
               "variant": variant, "bytes": peak, **ratios}  # fmt: skip


# ----------------------------------------------------------------------------------------------- switching and disk


def switching(args: SpeedArguments, network_name: str) -> Iterator[Row]:
    """Rows of the time to load an adapter, to switch between two loaded ones, and to swap one in place, on the CPU."""
    network, batch = make_network(network_name), images("1x64", "cpu")["pixel_values"]
    runs: dict[tuple[str, str], Callable[[], None]] = {}
    with tempfile.TemporaryDirectory() as root:
        for variant in ("lora", "colora"):
            folder = f"{root}/{variant}"
            make_variant(network, variant, args.parameter_budget).save_pretrained(folder)
            bare = make_variant(network, "bare", args.parameter_budget)
            model = PeftModel.from_pretrained(bare, folder, adapter_name="one").eval()
            model.load_adapter(folder, "two")
            own = switches(model, folder, batch) | (swaps(model, folder, batch) if variant == "colora" else {})
            runs |= {(variant, name): run for name, run in own.items()}
        for (variant, name), seconds in take_turns(runs, args.rounds, lambda: None).items():
            yield {"network": network_name, "mode": "cpu fp32", "what": name, "shape": "1x64", "variant": variant,
                   "seconds": statistics.median(seconds)}  # fmt: skip


def switches(model: PeftModel, folder: str, batch: torch.Tensor) -> dict[str, Callable[[], None]]:
    """What can be done with the adapters `one` and `two`; "run" is a run of its own, whatever came before."""
    untouched = copy.deepcopy(model)

    def load() -> None:
        model.delete_adapter("two")
        model.load_adapter(folder, "two")

    def switch() -> None:
        model.set_adapter("one" if model.active_adapter == "two" else "two", inference_mode=True)

    def switch_and_run() -> None:
        switch()
        _run(model, batch)

    return {
        "load_adapter": load,
        "set_adapter": switch,
        "run": lambda: _run(untouched, batch),
        "set_adapter and run": switch_and_run,
    }


def swaps(model: PeftModel, folder: str, batch: torch.Tensor) -> dict[str, Callable[[], None]]:
    """Swapping an adapter in place, in a plain network and in one that is prepared to be compiled."""
    model.set_adapter("two", inference_mode=True)
    plain, prepared = copy.deepcopy(model), copy.deepcopy(model)
    prepare_model_for_compiled_hotswap(prepared)

    def swap_and_run() -> None:
        hotswap_adapter(plain, folder, "two")
        _run(plain, batch)

    return {
        "hotswap_adapter": lambda: hotswap_adapter(plain, folder, "two"),
        "hotswap_adapter and run": swap_and_run,
        "hotswap_adapter, prepared": lambda: hotswap_adapter(prepared, folder, "two"),
    }


@torch.no_grad()
def _run(model: PeftModel, batch: torch.Tensor) -> None:
    model(batch)


def disk(args: SpeedArguments, network_name: str) -> Iterator[Row]:
    """Rows of the bytes on disk for 1 and 10 tasks: one network and an adapter each, or a network each."""
    network = make_network(network_name)
    sizes = {}
    for variant in ("lora", "colora"):
        with tempfile.TemporaryDirectory() as folder:
            make_variant(network, variant, args.parameter_budget).save_pretrained(folder)
            sizes[variant] = sum(file.stat().st_size for file in Path(folder).iterdir() if file.name != "README.md")
    base = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    for tasks in (1, 10):
        for variant, size in {"full": base, **sizes}.items():
            total = tasks * base if variant == "full" else base + tasks * size
            yield {"network": network_name, "what": f"disk, {tasks} tasks", "variant": variant, "bytes": total,
                   "ratio_to_full": total / (tasks * base)}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- report


def table(rows: Iterable[Row]) -> str:
    """Markdown: one line for each row, in the order in which they were measured."""
    lines = ["| network | mode | what | shape | variant | | to full / bare | to LoRA |", "|---" * 8 + "|"]
    for row in rows:
        amount = f"{row['seconds'] * 1e3:,.1f} ms" if "seconds" in row else f"{row['bytes'] / 1e6:,.1f} MB"
        ratios = [next((row[key] for key in keys if key in row), None)
                  for keys in (("ratio_to_full", "ratio_to_bare"), ("ratio_to_lora",))]  # fmt: skip
        shown = ["" if ratio is None else f"{ratio:.3f}" for ratio in ratios]
        cells = [
            row["network"],
            row.get("mode", ""),
            row["what"],
            row.get("shape", ""),
            row["variant"],
            amount,
            *shown,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def measure(args: SpeedArguments) -> Iterator[Row]:
    for network_name in args.networks:
        for mode in modes():
            for what, shapes in (("training step", args.train_shapes), ("inference", args.inference_shapes)):
                for shape in shapes:
                    yield from timings(args, network_name, mode, what, shape)
            yield from memories(args, network_name, mode, args.train_shapes[0])
        yield from switching(args, network_name)
        yield from disk(args, network_name)


def main(args: SpeedArguments) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = {name: version(name) for name in ("torch", "peft", "colora-peft")}
    facts = {"hardware": hardware_name(device), "python": sys.version.split()[0], **facts, **asdict(args)}
    del facts["output_dir"]
    rows = []
    for row in measure(args):
        rows.append(row)
        print(table([row]).splitlines()[-1], flush=True)
    name = re.sub(r"[^a-z0-9.]+", "-", f"speed {facts['hardware']} torch{facts['torch']}".lower()).strip("-")
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", {**facts, "rows": rows})
    settings = ", ".join(f"{key} {value}" for key, value in facts.items())
    write_text(folder / f"{name}.md", f"Made by `python examples/benchmark_speed.py`: {settings}.\n\n{table(rows)}\n")


if __name__ == "__main__":
    try:
        main(HfArgumentParser(SpeedArguments).parse_args_into_dataclasses()[0])
    except ValueError as error:
        sys.exit(f"benchmark_speed.py: {error}")
