"""Measure what it takes to load an adapter onto a loaded network, to switch to another, and to check the base.

    python examples/measure_loading.py

prints, for the shipped network and an adapter of 1 MB, wall-clock and processor milliseconds; on a machine that does
other work, the latter are the ones to compare.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model

import colora_peft
from colora_peft import CoLoRAConfig
from colora_peft.hub import load_backbone

NETWORK = Path(__file__).parent / "checkpoints" / "nafnet-small-prod"


def milliseconds(run: Callable[[int], object], repeats: int) -> str:
    """Median and best of `run(0)`, `run(1)`, ..."""
    wall, processor = [], []
    for number in range(repeats):
        wall_start, processor_start = time.perf_counter(), time.process_time()
        run(number)
        processor.append(1e3 * (time.process_time() - processor_start))
        wall.append(1e3 * (time.perf_counter() - wall_start))
    return (
        f"wall {statistics.median(wall):6.1f} (best {min(wall):6.1f}), "
        f"processor {statistics.median(processor):6.1f} (best {min(processor):6.1f})"
    )


def main(repeats: int, threads: int) -> None:
    torch.set_num_threads(threads)
    image = torch.rand(1, 3, 64, 64)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        # A budget that gives this network of 2 M parameters an adapter of 1 MB.
        get_peft_model(
            load_backbone(str(NETWORK)), CoLoRAConfig(parameter_budget=0.12, init_weights=False)
        ).save_pretrained(folder)
        size = os.path.getsize(f"{folder}/adapter_model.safetensors")
        print(f"adapter of {size / 1e6:.2f} MB, {threads} threads, torch {torch.__version__}; milliseconds, median")
        bases = [load_backbone(str(NETWORK)) for _ in range(2 * repeats)]

        def show(what: str, run: Callable[[int], object]) -> None:
            print(f"{what:34} {milliseconds(run, repeats)}")

        show("base_fingerprint", lambda number: colora_peft.base_fingerprint(bases[number]))
        show("PeftModel.from_pretrained", lambda number: PeftModel.from_pretrained(bases[number], folder))
        show("colora_peft.load, base in memory", lambda number: colora_peft.load(folder, base=bases[repeats + number]))
        model = PeftModel.from_pretrained(load_backbone(str(NETWORK)), folder).eval()
        show("load_adapter, a further one", lambda number: model.load_adapter(folder, f"further{number}"))
        model = colora_peft.load(folder, base=load_backbone(str(NETWORK)), adapter_name="a")
        colora_peft.load(folder, base=model, adapter_name="b")
        show("set_adapter, of two", lambda number: model.set_adapter("ab"[number % 2]))
        show("run, 1 x 64 x 64", lambda number: model(image))
        show("set_adapter and the first run", lambda number: (model.set_adapter("ab"[number % 2]), model(image)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="How often each is measured.")
    parser.add_argument("--threads", type=int, default=2, help="Threads of PyTorch.")
    args = parser.parse_args()
    main(args.repeats, args.threads)
