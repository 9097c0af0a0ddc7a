"""Find the learning rate of each fine-tuning method, on training pairs only.

    python examples/search_learning_rates.py --train_dir path/to/underwater/train

Some pairs of the folder are drawn for training, others validate; a test split is never touched. Every cell is a whole
run of `finetune.py`'s loop. Cells are kept in one JSON file and not run again, so the grid can grow
over many calls; each call ends by printing the table.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import tempfile
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from finetune import FinetuneArguments, measure_contributions
from transformers import AutoModelForImageToImage, HfArgumentParser

import colora_peft.models  # noqa: F401 - registers the backbones
from colora_peft import CoLoRAConfig
from colora_peft.cards import hardware_name
from colora_peft.evaluation import evaluate
from colora_peft.files import write_json, write_text
from colora_peft.pairs import PairedImageFolder, PairSource, PairSubset, draw_pairs
from colora_peft.patches import PairedPatches
from colora_peft.training import TrainingDiverged, train, use_all_cores
from colora_peft.tuning import METHODS, prepare_for_tuning, trained_parameters

HERE = Path(__file__).parent


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
    results: str = field(
        default=str(HERE / "benchmark_results" / "learning_rates.json"), metadata={"help": "File of the cells."}
    )


@cache
def network_fingerprint() -> str:
    """First digits of the hash of the weights that every cell starts from."""
    weights = Path(FinetuneArguments.model_name_or_path) / "model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:16]


def cell_settings(args: SearchArguments, method: str, learning_rate: float, seed: int) -> dict[str, object]:
    """Everything that decides the outcome of a cell; two cells with equal settings are the same cell."""
    settings = {
        "task": Path(args.train_dir).resolve().parent.name,
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


def split_pairs(args: SearchArguments, seed: int) -> tuple[PairSource, PairSource]:
    """Pairs to train on, drawn by the seed, and others to validate on."""
    pairs = PairedImageFolder(args.train_dir)
    if len(pairs) < args.train_pairs + args.validation_pairs:
        raise ValueError(
            f"{args.train_dir} holds {len(pairs)} pairs, too few to train on {args.train_pairs} and validate on "
            f"{args.validation_pairs}."
        )
    if args.validation == "colours":
        held_out = strangest_colours(pairs, args.validation_pairs)
    else:
        first = seed % (len(pairs) // args.validation_pairs) * args.validation_pairs
        held_out = list(range(first, first + args.validation_pairs))
    others = PairSubset(pairs, [index for index in range(len(pairs)) if index not in held_out])
    return draw_pairs(others, args.train_pairs, seed)[0], PairSubset(pairs, held_out)


def strangest_colours(pairs: PairSource, count: int) -> list[int]:
    """The pairs whose inputs' mean colours lie farthest from the median one."""
    colours = torch.stack([pairs[index][0].mean((1, 2)) for index in range(len(pairs))])
    distances = (colours - colours.median(0).values).norm(dim=1)
    return sorted(distances.topk(count).indices.tolist())


def run_cell(
    settings: dict[str, object], args: SearchArguments, accelerator: Accelerator, scores: dict[int, dict[str, float]]
) -> dict[str, object]:
    """Train and validate once. `scores` keeps the contributions of each seed between cells."""
    seed, method = settings["seed"], settings["method"]
    set_seed(seed)
    chosen, validation = split_pairs(args, seed)
    model = AutoModelForImageToImage.from_pretrained(FinetuneArguments.model_name_or_path, dtype=torch.float32)
    model.to(accelerator.device, memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as folder:
        run = FinetuneArguments(
            output_dir=folder,
            method=method,
            learning_rate=settings["learning_rate"],
            seed=seed,
            max_train_steps=args.max_train_steps,
            resolution=args.resolution,
            per_device_train_batch_size=args.per_device_train_batch_size,
            checkpointing_steps=args.max_train_steps,
        )
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
        sizes = trained_parameters(model)
        try:
            model, seconds = train(model, patches, run, accelerator)
            quality = evaluate(model, validation, accelerator.device, "validation")
        except TrainingDiverged as error:
            return {**settings, "failed": str(error)}
        finally:
            accelerator.free_memory()
    return {**settings, **quality, **sizes, "seconds": seconds, "hardware": hardware_name(accelerator.device)}


def table(cells: list[dict[str, object]]) -> str:
    """Markdown: one row per method and setting, one column per learning rate, mean validation PSNR over the seeds."""
    rows = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        rows[row_name(cell)][cell["learning_rate"]].append(cell.get("psnr", float("nan")))
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


def row_name(cell: dict[str, object]) -> str:
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
    results = Path(args.results)
    cells = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else []
    scores: dict[int, dict[str, float]] = {}
    for seed in args.seeds:
        for method in args.methods:
            for learning_rate in args.learning_rates:
                settings = cell_settings(args, method, learning_rate, seed)
                if any(settings.items() <= cell.items() for cell in cells):
                    continue
                print(settings)
                cells.append(run_cell(settings, args, accelerator, scores))
                results.parent.mkdir(parents=True, exist_ok=True)
                write_json(results, cells)
                print(f"-> {cells[-1].get('psnr', float('nan')):.2f} dB")
    report = (
        f"Mean validation PSNR over the seeds (number of seeds); the best of each row in bold.\n\n{table(cells)}\n"
    )
    write_text(results.with_suffix(".md"), report)
    print(f"\n{report}")


if __name__ == "__main__":
    try:
        (parsed,) = HfArgumentParser(SearchArguments).parse_args_into_dataclasses()
        print(f"{asdict(parsed)}\n")
        main(parsed)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"search_learning_rates.py: {error}")
