"""Measure what many tasks cost on a device, on disk and in memory: one network with an adapter a task, or N networks.

    python examples/measure_tasks.py

saves networks and adapters as fine-tuning leaves them (float32, also the shipped network, whose own file is float16;
the size is what counts, so the factors of the adapters are random), adds up the files, and lets a fresh process hold
all of a row at once: for each task in turn the adapter is activated, or the network taken, and one image of 64 x 64
runs through. Its resident memory, less that of a process that has only imported the packages, is the figure. The
result is a Markdown table.
"""

from __future__ import annotations

import gc
import multiprocessing
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from peft import PeftModel, get_peft_model
from transformers import HfArgumentParser

from colora_peft import CoLoRAConfig
from colora_peft.hub import hardware_name, load_backbone
from colora_peft.utils import relative_path, write_text

SHIPPED = relative_path(Path(__file__).parent / "checkpoints" / "nafnet-small-prod")
BUDGETS = (0.07, 0.02)
HEADER = "| network | tasks | kept as | disk (MB) | memory (MB) | disk, of N networks | memory, of N networks |"


@dataclass
class TasksArguments:
    """Flags of the measurement."""

    num_tasks: list[int] = field(default_factory=lambda: [1, 10], metadata={"help": "Numbers of tasks."})
    models: list[str] = field(
        default_factory=lambda: [SHIPPED, "nafnet-width32"],
        metadata={"help": "Networks as load_backbone takes them; nafnet-width32 is the published network of 17 M "
                  "parameters with random weights."},
    )  # fmt: skip
    output_file: str = field(
        default="outputs/tasks.md", metadata={"help": "Where the table goes; an earlier one is replaced."}
    )

    def __post_init__(self) -> None:
        if min(self.num_tasks, default=0) < 1:
            raise ValueError(f"--num_tasks is {self.num_tasks}: name one or more numbers of at least 1.")


def nafnet_width32() -> torch.nn.Module:
    from colora_peft.models import NAFNetConfig, NAFNetForImageRestoration

    return NAFNetForImageRestoration(NAFNetConfig())


# ------------------------------------------------------------------------------------------------------------ files


def save_network(name: str, folder: Path) -> Path:
    """The network as fine-tuning in full saves it."""
    model = nafnet_width32() if name == "nafnet-width32" else load_backbone(name)
    model.save_pretrained(folder)
    return folder


def save_adapter(base: Path, budget: float, folder: Path) -> Path:
    config = CoLoRAConfig(parameter_budget=budget, init_weights=False)
    get_peft_model(load_backbone(str(base)), config).save_pretrained(folder)
    return folder


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# ----------------------------------------------------------------------------------------------------------- memory


def resident_bytes() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


@torch.inference_mode()
def hold_networks(folders: list[str]) -> int:
    """Added resident memory of all networks at once, each used."""
    image, before = torch.rand(1, 3, 64, 64), resident_bytes()
    networks = [load_backbone(folder) for folder in folders]
    for network in networks:
        network(image)
    return resident_bytes() - before


@torch.inference_mode()
def hold_adapters(base: str, folders: list[str]) -> int:
    """Added resident memory of a network with all adapters, each used."""
    image, before = torch.rand(1, 3, 64, 64), resident_bytes()
    model = PeftModel.from_pretrained(load_backbone(base), folders[0], adapter_name="task0").eval()
    for number, folder in enumerate(folders[1:], start=1):
        model.load_adapter(folder, adapter_name=f"task{number}")
    for number in range(len(folders)):
        model.set_adapter(f"task{number}", inference_mode=True)
        model(image)
    return resident_bytes() - before


def in_fresh_process(function: object, *arguments: object) -> int:
    # spawn: a forked process would begin with this one's memory.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


# ------------------------------------------------------------------------------------------------------------ table


def rows_of(name: str, num_tasks: list[int], folder: Path) -> list[str]:
    base = save_network(name, folder / "base")
    adapters = {budget: save_adapter(base, budget, folder / f"adapter-{budget}") for budget in BUDGETS}
    shown, rows = Path(name).name, []
    for count in num_tasks:
        disk, memory = count * bytes_in(base), in_fresh_process(hold_networks, [str(base)] * count)
        rows.append(f"| {shown} | {count} | whole networks | {disk / 1e6:.1f} | {memory / 1e6:.0f} | 1 | 1 |")
        for budget, adapter in adapters.items():
            own_disk = bytes_in(base) + count * bytes_in(adapter)
            own_memory = in_fresh_process(hold_adapters, str(base), [str(adapter)] * count)
            rows.append(
                f"| {shown} | {count} | base and adapters of {budget:.0%} | {own_disk / 1e6:.1f} | "
                f"{own_memory / 1e6:.0f} | {own_disk / disk:.2f} | {own_memory / memory:.2f} |"
            )
        print("\n".join(rows[-1 - len(adapters) :]), flush=True)
    return rows


def main(args: TasksArguments) -> None:
    torch.manual_seed(0)
    rows = []
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            rows += rows_of(name, args.num_tasks, Path(folder))
    facts = f"{hardware_name(torch.device('cpu'))}, torch {torch.__version__}; float32; 1 MB is 10^6 bytes."
    rule = "|---|---|---|---|---|---|---|"
    text = "\n".join(["# What tasks cost on a device", "", facts, "", HEADER, rule, *rows, ""])
    Path(args.output_file).parent.mkdir(parents=True, exist_ok=True)
    write_text(args.output_file, text)
    print(f"Saved in {args.output_file}.")


if __name__ == "__main__":
    try:
        (parsed,) = HfArgumentParser(TasksArguments).parse_args_into_dataclasses()
        main(parsed)
    except (ValueError, OSError) as error:
        sys.exit(f"measure_tasks.py: {error}")
