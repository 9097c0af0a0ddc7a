"""Time to load an adapter onto a loaded network, to switch to another, to swap one in place, and to check the base.

    python -m examples.experiments.storage.loading

Prints a table for the shipped network on the CPU, with adapters of PEFT's LoRA and of CoLoRA at the same ranks, about
1 MB each. On a machine that does other work, compare the time of the processor.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from peft import PeftModel

import colora_peft
from colora_peft import hotswap_adapter, prepare_model_for_compiled_hotswap
from colora_peft.hub import load_backbone
from colora_peft.utils import flag, run_script
from examples.experiments.measure import take_turns
from examples.experiments.speed.variants import make_variant
from examples.experiments.storage.tasks import SHIPPED
from examples.experiments.tables import markdown_table

Runs = dict[str, Callable[[], object]]


@dataclass
class LoadingArguments:
    """Flags of the measurement."""

    rounds: int = flag(7, "Number of times that each operation is measured, after one that does not count.")
    threads: int = flag(2, "Number of threads of PyTorch.")
    parameter_budget: float = flag(0.12, "Share of the weights, the same in every layer.")


def loads(folder: str, bases: Iterator[torch.nn.Module], is_colora: bool) -> Runs:
    """Ways to load the adapter in a folder; each takes a base that was not used before."""
    runs: Runs = {"PeftModel.from_pretrained": lambda: PeftModel.from_pretrained(next(bases), folder)}
    if is_colora:
        runs["base_fingerprint"] = lambda: colora_peft.base_fingerprint(next(bases))
        runs["colora_peft.load"] = lambda: colora_peft.load(folder, base=next(bases))
    return runs


def switches(model: PeftModel, folder: str, image: torch.Tensor) -> Runs:
    """Ways to use the adapters `one` and `two`; "run" has a network of its own, which no switch touches."""
    untouched = copy.deepcopy(model)

    def load() -> None:
        model.delete_adapter("two")
        model.load_adapter(folder, "two")

    def switch() -> None:
        model.set_adapter("one" if model.active_adapter == "two" else "two", inference_mode=True)

    return {
        "load_adapter": load,
        "set_adapter": switch,
        "run": lambda: untouched(image),
        "set_adapter and run": lambda: (switch(), model(image)),
    }


def swaps(model: PeftModel, folder: str, image: torch.Tensor) -> Runs:
    """Ways to swap an adapter in place, in a plain network and in one that is prepared to be compiled."""
    model.set_adapter("two", inference_mode=True)
    plain, prepared = copy.deepcopy(model), copy.deepcopy(model)
    prepare_model_for_compiled_hotswap(prepared)
    return {
        "hotswap_adapter": lambda: hotswap_adapter(plain, folder, "two"),
        "hotswap_adapter and run": lambda: (hotswap_adapter(plain, folder, "two"), plain(image)),
        "hotswap_adapter, prepared": lambda: hotswap_adapter(prepared, folder, "two"),
    }


@torch.no_grad()
def measure(args: LoadingArguments) -> Iterator[list[str]]:
    """Cells of a line for each kind of adapter and operation."""
    network, image = load_backbone(SHIPPED), torch.rand(1, 3, 64, 64)
    bases = (copy.deepcopy(network) for _ in iter(int, 1))
    for variant in ("lora", "colora"):
        with tempfile.TemporaryDirectory() as folder:
            make_variant(network, variant, args.parameter_budget).save_pretrained(folder)
            model = PeftModel.from_pretrained(next(bases), folder, adapter_name="one").eval()
            model.load_adapter(folder, "two")
            runs = loads(folder, bases, variant == "colora") | switches(model, folder, image)
            runs |= swaps(model, folder, image) if variant == "colora" else {}
            seconds = [take_turns(runs, args.rounds, clock=clock) for clock in (time.perf_counter, time.process_time)]
        for name in runs:
            yield [variant, name, *(f"{1e3 * statistics.median(own[name]):.1f} ms" for own in seconds)]


def main(args: LoadingArguments) -> None:
    """Measures and prints."""
    torch.set_num_threads(args.threads)
    print(markdown_table(["adapter", "operation", "wall clock", "processor"], measure(args)))


if __name__ == "__main__":
    run_script(main, LoadingArguments)
