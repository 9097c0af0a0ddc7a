"""Disk and memory of many tasks on a device: one network with an adapter for each task, or a network for each.

    python -m examples.experiments.storage.tasks

Networks and adapters are saved as fine-tuning leaves them, in float32. The shipped network's own file is float16. The
factors of the adapters are random, because their size alone counts. A fresh process holds all of a row at once: for
each task in turn it activates the adapter, or takes the network, and runs one image of 64 x 64. The figure is its
resident memory minus that before the networks were loaded. The result is a Markdown table.
"""

from __future__ import annotations

import gc
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from peft import PeftModel, get_peft_model

from colora_peft import CoLoRAConfig
from colora_peft.hub import hardware_name, load_backbone
from colora_peft.models import NAFNetConfig, NAFNetForImageRestoration
from colora_peft.utils import flag, relative_path, run_script, write_text
from examples.experiments.measure import in_fresh_process
from examples.experiments.tables import markdown_table, table_line

SHIPPED = relative_path(Path(__file__).parents[2] / "checkpoints" / "nafnet-small-prod")
BUDGETS = (0.07, 0.02)


@dataclass
class TasksArguments:
    """Flags of the measurement."""

    num_tasks: list[int] = flag(factory=lambda: [1, 10], help="Numbers of tasks.")
    models: list[str] = flag(
        factory=lambda: [SHIPPED, "nafnet-width32"],
        help="Networks as load_backbone takes them; nafnet-width32 is the published one with random weights.",
    )
    output_file: str = flag("outputs/tasks.md", "File for the table; an earlier one is replaced.")

    def __post_init__(self) -> None:
        if min(self.num_tasks, default=0) < 1:
            raise ValueError(f"--num_tasks is {self.num_tasks}: name one or more numbers of at least 1.")


# ------------------------------------------------------------------------------------------------------------ files


def save_network(name: str, folder: Path) -> Path:
    """Saves the network as full fine-tuning does."""
    model = NAFNetForImageRestoration(NAFNetConfig()) if name == "nafnet-width32" else load_backbone(name)
    model.save_pretrained(folder)
    return folder


def save_adapter(base: Path, budget: float, folder: Path) -> Path:
    """Saves an adapter with random factors."""
    config = CoLoRAConfig(parameter_budget=budget, init_weights=False)
    get_peft_model(load_backbone(str(base)), config).save_pretrained(folder)
    return folder


def bytes_in(folder: Path) -> int:
    """Size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# ----------------------------------------------------------------------------------------------------------- memory


def resident_bytes() -> int:
    """Resident memory of this process."""
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


# ------------------------------------------------------------------------------------------------------------ table


def rows_of(name: str, num_tasks: list[int], folder: Path) -> list[list[object]]:
    """Lines of the table for one network."""
    base = save_network(name, folder / "base")
    adapters = {budget: save_adapter(base, budget, folder / f"adapter-{budget}") for budget in BUDGETS}
    shown, rows = Path(name).name, []
    for count in num_tasks:
        disk, memory = count * bytes_in(base), in_fresh_process(hold_networks, [str(base)] * count)
        rows.append([shown, count, "whole networks", f"{disk / 1e6:.1f}", f"{memory / 1e6:.0f}", 1, 1])
        for budget, adapter in adapters.items():
            own_disk = bytes_in(base) + count * bytes_in(adapter)
            own_memory = in_fresh_process(hold_adapters, str(base), [str(adapter)] * count)
            sizes = [f"{own_disk / 1e6:.1f}", f"{own_memory / 1e6:.0f}"]
            ratios = [f"{own_disk / disk:.2f}", f"{own_memory / memory:.2f}"]
            rows.append([shown, count, f"base and adapters of {budget:.0%}", *sizes, *ratios])
        print("\n".join(map(table_line, rows[-1 - len(adapters) :])), flush=True)
    return rows


def main(args: TasksArguments) -> None:
    """Measures and writes the table."""
    torch.manual_seed(0)
    rows = []
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            rows += rows_of(name, args.num_tasks, Path(folder))
    facts = f"{hardware_name(torch.device('cpu'))}, torch {torch.__version__}; float32; 1 MB is 10^6 bytes."
    heads = ["network", "tasks", "kept as", "disk (MB)", "memory (MB)", "disk, of N networks", "memory, of N networks"]
    Path(args.output_file).parent.mkdir(parents=True, exist_ok=True)
    title = "# Disk and memory of many tasks on a device"
    write_text(args.output_file, f"{title}\n\n{facts}\n\n{markdown_table(heads, rows)}\n")
    print(f"Saved in {args.output_file}.")


if __name__ == "__main__":
    run_script(main, TasksArguments)
