"""Find the learning rate of each fine-tuning method, on training pairs only.

    python examples/search_learning_rates.py --train_dir path/to/underwater/train

Some pairs of the folder are drawn for training, others validate; a test split is never touched. Every cell is a whole
run of `finetune.py`'s loop. Cells are kept in one JSON file and not run again, so the grid can grow
over many calls; each call ends by printing the table.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import Literal

from accelerate import Accelerator
from accelerate.utils import set_seed
from finetune import FinetuneArguments
from grid_cells import (
    RESULTS,
    Cell,
    CellFile,
    load_network,
    network_fingerprint,
    run_arguments,
    split_pairs,
    task_name,
    train_and_validate,
)
from restoration_task import measure_contributions
from transformers import HfArgumentParser

from colora_peft import CoLoRAConfig
from colora_peft.data import PairedPatches
from colora_peft.training import METHODS, DataFailed, prepare_for_tuning, use_all_cores
from colora_peft.utils import write_text


@dataclass
class SearchArguments:
    """Flags of the search."""

    train_dir: str = field(metadata={"help": "Folder with input/ and target/; more pairs than --train_pairs."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Methods to run."})
    learning_rates: list[float] = field(
        default_factory=lambda: [3e-4, 1e-3, 3e-3], metadata={"help": "Learning rates to run with each method."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "Seeds: pairs, patches and adapters."})
    beta: float = field(default=CoLoRAConfig.beta, metadata={"help": "Exponent from contribution to rank (colora)."})
    colora_alpha: float = field(default=CoLoRAConfig.colora_alpha, metadata={"help": "Gain of the adapters."})
    parameter_budget: float = field(default=0.07, metadata={"help": "Trained share of the adapted weights."})
    uniform_rank: int | None = field(
        default=None, metadata={"help": "Instead of a budget, this rank in every layer (method lora)."}
    )
    max_train_steps: int = field(default=500, metadata={"help": "Steps of each cell."})
    resolution: int = field(default=FinetuneArguments.resolution, metadata={"help": "Side of the patches."})
    per_device_train_batch_size: int = field(
        default=FinetuneArguments.per_device_train_batch_size, metadata={"help": "Patches a step."}
    )
    train_pairs: int = field(default=16, metadata={"help": "Pairs to train on, drawn by the seed."})
    validation_pairs: int = field(default=18, metadata={"help": "Other pairs of --train_dir to validate on."})
    validation: Literal["block", "colours"] = field(
        default="block",
        metadata={"help": "block: neighbours in the list, another block for each seed, as if from the same place; "
                  "colours: the pairs whose colours are the strangest, as if from another place."},
    )  # fmt: skip
    results: str = field(default=str(RESULTS / "learning_rates.json"), metadata={"help": "File of the cells."})


def cell_settings(args: SearchArguments, method: str, learning_rate: float, seed: int) -> Cell:
    """Everything that decides the outcome of a cell; two cells with equal settings are the same cell."""
    settings = {
        "task": task_name(args.train_dir),
        "model_sha256": network_fingerprint(),
        "method": method,
        "learning_rate": learning_rate,
        "seed": seed,
        "max_train_steps": args.max_train_steps,
        "resolution": args.resolution,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "validation": args.validation,
        "train_pairs": args.train_pairs,
        "validation_pairs": args.validation_pairs,
    }
    if method in ("colora", "lora"):
        settings |= {"colora_alpha": args.colora_alpha, "parameter_budget": args.parameter_budget}
        settings |= {"uniform_rank": args.uniform_rank}
    if method == "colora":
        settings |= {"beta": args.beta}
    return settings


def run_cell(
    settings: Cell, args: SearchArguments, accelerator: Accelerator, scores: dict[int, dict[str, float]]
) -> Cell:
    """Train and validate once. `scores` keeps the contributions of each seed between cells."""
    seed, method = settings["seed"], settings["method"]
    set_seed(seed)
    chosen, validation = split_pairs(args.train_dir, args.train_pairs, args.validation_pairs, seed, args.validation)
    model = load_network(accelerator)
    with tempfile.TemporaryDirectory() as folder:
        run = run_arguments(args, folder, settings["learning_rate"], seed)
        patches = PairedPatches(chosen, run.resolution, seed)
        if method == "colora" and seed not in scores:
            scores[seed] = measure_contributions(model, patches, run, accelerator).scores
        config = CoLoRAConfig(
            contributions=scores[seed] if method == "colora" else None,
            parameter_budget=args.parameter_budget,
            ranks=args.uniform_rank,
            beta=args.beta,
            colora_alpha=args.colora_alpha,
        )
        # `lora` allocates by the budget; given ranks are an adapter like any other.
        model = prepare_for_tuning(model, "colora" if args.uniform_rank else method, config)
        return {**settings, **train_and_validate(model, patches, validation, run, accelerator)}


def table(cells: list[Cell]) -> str:
    """Markdown: one row per method and setting, one column per learning rate, mean validation PSNR over the seeds."""
    rows = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        rows[row_name(cell)][cell["learning_rate"]].append(cell.get("psnr", math.nan))
    rates = sorted({rate for row in rows.values() for rate in row})
    lines = [
        "| dB at learning rate | " + " | ".join(f"{rate:g}" for rate in rates) + " |",
        "|---" * (len(rates) + 1) + "|",
    ]
    for name, row in rows.items():
        best = max((mean(values) for values in row.values() if not math.isnan(mean(values))), default=0.0)
        shown = []
        for rate in rates:
            if rate not in row:
                shown.append("")
                continue
            text = f"{mean(row[rate]):.2f} ({len(row[rate])})"
            shown.append(f"**{text}**" if mean(row[rate]) == best else text)
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def row_name(cell: Cell) -> str:
    name = f"{cell['task']}, {cell['method']}"
    if cell.get("uniform_rank") is not None:
        return f"{name}, rank {cell['uniform_rank']}, alpha {cell['colora_alpha']:g}"
    patches = f"{cell['per_device_train_batch_size']} x {cell['resolution']}"
    name += f", {cell['train_pairs']} pairs, {cell['max_train_steps']} steps of {patches}, on {cell['validation']}"
    if "colora_alpha" in cell:
        name += f", {cell['parameter_budget']:.1%}, alpha {cell['colora_alpha']:g}"
    return f"{name}, beta {cell['beta']:g}" if "beta" in cell else name


def main(args: SearchArguments) -> None:
    if args.uniform_rank is not None and args.methods != ["lora"]:
        raise ValueError("--uniform_rank is for --methods lora.")
    accelerator = Accelerator()
    use_all_cores(accelerator)
    file = CellFile(args.results)
    scores: dict[int, dict[str, float]] = {}
    for seed in args.seeds:
        for method in args.methods:
            for learning_rate in args.learning_rates:
                settings = cell_settings(args, method, learning_rate, seed)
                if file.find(settings) is not None:
                    continue
                print(settings)
                file.add(run_cell(settings, args, accelerator, scores))
                print(f"-> {file.cells[-1].get('psnr', math.nan):.2f} dB")
    report = (
        f"Mean validation PSNR over the seeds (number of seeds); the best of each row bold.\n\n{table(file.cells)}\n"
    )
    write_text(file.path.with_suffix(".md"), report)
    print(f"\n{report}")


if __name__ == "__main__":
    try:
        (parsed,) = HfArgumentParser(SearchArguments).parse_args_into_dataclasses()
        print(f"{asdict(parsed)}\n")
        main(parsed)
    except (ValueError, FileNotFoundError, DataFailed) as error:
        sys.exit(f"search_learning_rates.py: {error}")
