"""Does a trained magnitude, as in DoRA, help CoLoRA? An experiment: the product has none.

    python examples/compare_magnitude.py --train_dirs path/to/underwater/train path/to/noise/train

DoRA (Liu et al., ICML 2024, arXiv 2402.09353) trains W = m * (W0 + delta) / ||W0 + delta||, the norm over the inputs
of each output and without a gradient of its own. Both variants of a task and seed share pairs, patches, scores, ranks
and initial adapters. Some pairs of each folder validate; a test split is never touched. Cells are kept in one JSON
file and not run again.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from finetune import FinetuneArguments, measure_contributions
from search_learning_rates import HERE, SearchArguments, network_fingerprint, split_pairs
from torch import Tensor, nn
from transformers import AutoModelForImageToImage, HfArgumentParser

import colora_peft.models  # noqa: F401 - registers the backbones
from colora_peft import CoLoRAConfig, CoLoRALayer
from colora_peft.cards import hardware_name
from colora_peft.evaluation import evaluate
from colora_peft.files import write_json, write_text
from colora_peft.patches import PairedPatches
from colora_peft.training import TrainingDiverged, train, use_all_cores
from colora_peft.tuning import prepare_for_tuning, trained_parameters

VARIANTS = ("plain", "magnitude")


@dataclass
class MagnitudeArguments:
    """Flags of the comparison."""

    train_dirs: list[str] = field(metadata={"help": "Folders with input/ and target/, one for each task."})
    learning_rates: list[float] = field(default_factory=lambda: [3e-3, 1e-2], metadata={"help": "For each variant."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Pairs, patches and adapters."})
    max_train_steps: int = field(default=200, metadata={"help": "Steps of each cell."})
    train_pairs: int = field(default=16, metadata={"help": "Pairs to train on, drawn by the seed."})
    validation_pairs: int = field(default=12, metadata={"help": "Other pairs of the folder, to validate on."})
    results: str = field(
        default=str(HERE / "benchmark_results" / "magnitude.json"), metadata={"help": "File of the cells."}
    )


class MagnitudeLayer(CoLoRALayer):
    """A layer whose effective weight keeps the direction of W0 + delta, and has a trained length for each output."""

    def effective_weight(self) -> Tensor:
        weight = super().effective_weight()
        return self.colora_magnitude * weight / _lengths(self, weight).detach()

    def _factors_to_train(self, x: Tensor) -> None:
        return None  # the gradients of factors alone are those of W0 + B A


def _lengths(layer: CoLoRALayer, weight: Tensor) -> Tensor:
    """Norm of `weight` over all that belongs to one output, in a shape that broadcasts."""
    output_dim = 1 if isinstance(layer.get_base_layer(), nn.ConvTranspose2d) else 0
    others = [dim for dim in range(weight.dim()) if dim != output_dim]
    return weight.square().sum(others, keepdim=True).sqrt().clamp_min(1e-12)


def add_magnitudes(model: nn.Module) -> None:
    """Give each adapted layer of `model` a magnitude, with which it still computes the same."""
    for layer in model.modules():
        if isinstance(layer, CoLoRALayer):
            weight = layer.get_base_layer().weight.detach()
            layer.colora_magnitude = nn.Parameter(_lengths(layer, weight))
            layer.__class__ = MagnitudeLayer


def cell_settings(
    args: MagnitudeArguments, train_dir: str, variant: str, learning_rate: float, seed: int
) -> dict[str, object]:
    """Everything that decides the outcome of a cell."""
    return {
        "task": Path(train_dir).resolve().parent.name,
        "model_sha256": network_fingerprint(),
        "variant": variant,
        "learning_rate": learning_rate,
        "seed": seed,
        "max_train_steps": args.max_train_steps,
        "train_pairs": args.train_pairs,
        "validation_pairs": args.validation_pairs,
    }


def run_cell(
    settings: dict[str, object], train_dir: str, accelerator: Accelerator, scores: dict[tuple, dict[str, float]]
) -> dict[str, object]:
    """Train and validate once; `scores` keeps the contributions of each task and seed between cells."""
    seed, steps = settings["seed"], settings["max_train_steps"]
    search = SearchArguments(train_dir)
    search = replace(search, train_pairs=settings["train_pairs"], validation_pairs=settings["validation_pairs"])
    chosen, validation = split_pairs(search, seed)
    set_seed(seed)
    model = AutoModelForImageToImage.from_pretrained(FinetuneArguments.model_name_or_path, dtype=torch.float32)
    model.to(accelerator.device, memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as folder:
        run = FinetuneArguments(output_dir=folder, learning_rate=settings["learning_rate"], seed=seed)
        run = replace(run, max_train_steps=steps, checkpointing_steps=steps)
        patches = PairedPatches(chosen, run.resolution, seed)
        key = (settings["task"], seed)
        if key not in scores:
            scores[key] = measure_contributions(model, patches, run, accelerator).scores
        model = prepare_for_tuning(model, "colora", CoLoRAConfig(contributions=scores[key]))
        if settings["variant"] == "magnitude":
            add_magnitudes(model)
        sizes = trained_parameters(model)
        try:
            model, seconds = train(model, patches, run, accelerator)
            quality = evaluate(model, validation, accelerator.device, "validation")
        except TrainingDiverged as error:
            return {**settings, "failed": str(error)}
        finally:
            accelerator.free_memory()
    return {**settings, **quality, **sizes, "seconds": seconds, "hardware": hardware_name(accelerator.device)}


def best_by_seed(cells: list[dict[str, object]], task: str, variant: str) -> tuple[float, dict[int, float]]:
    """The learning rate with the highest mean PSNR, and the PSNR by seed there."""
    by_rate: dict[float, dict[int, float]] = {}
    for cell in cells:
        if (cell["task"], cell["variant"]) == (task, variant):
            by_rate.setdefault(cell["learning_rate"], {})[cell["seed"]] = cell.get("psnr", -math.inf)
    rate = max(by_rate, key=lambda rate: mean(by_rate[rate].values()))
    return rate, by_rate[rate]


def report(cells: list[dict[str, object]]) -> str:
    """Markdown: each cell's mean, then the paired differences and what follows from them."""
    lines = ["| task | variant | trained parameters | learning rate | PSNR (dB), mean over seeds |", "|---" * 5 + "|"]
    kinds = sorted(
        {(c["task"], c["variant"], c["learning_rate"]) for c in cells}, key=lambda k: (k[0], k[1] != "plain")
    )
    for kind in kinds:
        own = [c for c in cells if (c["task"], c["variant"], c["learning_rate"]) == kind]
        psnr = [cell.get("psnr", math.nan) for cell in own]
        size = own[0].get("trainable_parameters", "diverged")
        lines.append(f"| {kind[0]} | {kind[1]} | {size} | {kind[2]:g} | {mean(psnr):.2f} ({len(psnr)} seeds) |")
    differences = []
    for task in sorted({cell["task"] for cell in cells}):
        (plain_rate, plain), (rate, magnitude) = (best_by_seed(cells, task, variant) for variant in VARIANTS)
        own = [magnitude[seed] - plain[seed] for seed in plain if seed in magnitude]
        differences += own
        lines.append(
            f"\n{task}: magnitude at {rate:g} minus plain at {plain_rate:g}: {mean(own):+.2f} dB "
            f"({', '.join(f'{value:+.2f}' for value in own)})."
        )
    error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    helps = mean(differences) > max(2 * error, 0.1)
    lines.append(
        f"\nOver all tasks and seeds: {mean(differences):+.2f} dB, standard error {error:.2f}: a magnitude "
        f"{'helps' if helps else 'does not measurably help'}."
    )
    return "\n".join(lines)


def main(args: MagnitudeArguments) -> None:
    accelerator = Accelerator()
    use_all_cores(accelerator)
    results = Path(args.results)
    cells = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else []
    scores: dict[tuple, dict[str, float]] = {}
    for seed in args.seeds:
        for train_dir in args.train_dirs:
            for learning_rate in args.learning_rates:
                for variant in VARIANTS:
                    settings = cell_settings(args, train_dir, variant, learning_rate, seed)
                    if any(settings.items() <= cell.items() for cell in cells):
                        continue
                    cells.append(run_cell(settings, train_dir, accelerator, scores))
                    results.parent.mkdir(parents=True, exist_ok=True)
                    write_json(results, cells)
                    print(f"{settings} -> {cells[-1].get('psnr', math.nan):.2f} dB", flush=True)
    text = report(cells)
    write_text(results.with_suffix(".md"), f"Made by `python examples/compare_magnitude.py`.\n\n{text}\n")
    print(text)


if __name__ == "__main__":
    try:
        (parsed,) = HfArgumentParser(MagnitudeArguments).parse_args_into_dataclasses()
        print(f"{asdict(parsed)}\n")
        main(parsed)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"compare_magnitude.py: {error}")
