"""One learning rate for every rank: PSNR over learning rate for uniform ranks 1 to dense, and for CoLoRA's mix.

    python -m examples.experiments.scaling.run --train_dir path/to/underwater/train

The effect of a layer's step depends on the factor before its delta and on how A is drawn. `RULES` describes the rules
that are compared; the rule of the package, and the reason for it, are in colora_peft/tuner/scaling.py. On training
pairs alone: some are trained on, others validate. Cells are kept in one JSON file and not run again; several processes
may share it (--part 0/2 and --part 1/2, one on each core).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Literal, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import PeftModel, get_peft_model
from torch import nn

from colora_peft import CoLoRAConfig, CoLoRALayer
from colora_peft.contribution import OnePassEstimator
from colora_peft.data import PairedPatches, PairSource
from colora_peft.evaluation import evaluate
from colora_peft.training import DataFailed, use_all_cores
from colora_peft.utils import flag, run_script, write_text
from examples.experiments.grid.cells import (
    Cell,
    CellFile,
    FinetuneArguments,
    NetworkArguments,
    load_network,
    measure_contributions,
    network_fingerprint,
    own_part,
    run_arguments,
    split_pairs,
    task_name,
    train_and_validate,
)
from examples.experiments.tables import markdown_table

DENSE = 10**6
"""A rank so high that every layer is dense."""
MIX = "mix"
SHARED = ("max_train_steps", "resolution", "per_device_train_batch_size", "train_pairs", "validation_pairs")
"""Settings that cells have in common if they are to be compared."""


class Rule(NamedTuple):
    """Factor before the delta and standard deviation of A, of a (d, k) layer."""

    factors: Callable[[int, int], float]
    """Factor before the delta of a low-rank layer, from its rank and k."""
    dense: Callable[[int], float]
    """Factor before the delta of a dense layer, from k."""
    std: Callable[[int], float]
    """Standard deviation of A, from k."""


RULES = {
    # LoRA as PEFT draws and scales it with alpha = rank.
    "lora": Rule(lambda r, k: 1.0, lambda k: 1.0, lambda k: 1 / math.sqrt(3 * k)),
    # Equal movement of the weights in the first step of Adam: the package's until method_version 2.
    "sqrt": Rule(lambda r, k: 3 / math.sqrt(r), lambda k: 3 / math.sqrt(k), lambda k: 1 / math.sqrt(k)),
    # Equal movement of the outputs in the first step of Adam.
    "linear": Rule(lambda r, k: 16 / r, lambda k: 16 / k, lambda k: 1 / math.sqrt(k)),
    # The same, and A so large that it turns slowly: movement stays nearly equal after the first step, too. The
    # package's.
    "linear_unit": Rule(lambda r, k: 16 / (r * math.sqrt(k)), lambda k: 16 / k, lambda k: 1.0),
    # Factors as LoRA has them with PEFT's alpha of 8, and dense deltas that move the outputs as far as these in the
    # first step of Adam.
    "lora_linear": Rule(lambda r, k: 8 / r, lambda k: 8 / (math.sqrt(3) * k), lambda k: 1 / math.sqrt(3 * k)),
    # The same as "linear_unit" with layers of large fan-in moving faster, as "sqrt" has it.
    "linear_unit_sqrt": Rule(lambda r, k: 4 / (3 * r), lambda k: 4 / (3 * math.sqrt(k)), lambda k: 1.0),
}


@dataclass(kw_only=True)
class ScalingArguments(NetworkArguments):
    """Flags of the comparison."""

    train_dir: str = flag(help="Folder TASK/train with input/ and target/.")
    rules: list[str] = flag(factory=lambda: ["linear_unit"], help=f"Rules to compare: {', '.join(RULES)}.")
    ranks: list[str] = flag(
        factory=lambda: ["1", "2", "4", "8", "16", "dense", MIX],
        help="The same rank in every layer; dense; or mix: ranks by contribution under the budget.",
    )
    learning_rates: list[float] = flag(
        factory=lambda: [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2], help="Learning rates to run with each rank."
    )
    seeds: list[int] = flag(factory=lambda: [0], help="Seeds that draw pairs, patches and adapters.")
    parameter_budget: float = flag(0.07, "Trained share of the weights (mix).")
    estimator: Literal["probe", OnePassEstimator] = flag(
        FinetuneArguments.estimator, "How contributions are measured (mix)."
    )
    results: str = flag(
        str(Path(__file__).parent / "cells.json"), "JSON file of the cells; the report lies beside it."
    )

    def __post_init__(self) -> None:
        unknown = [name for name in self.rules if name not in RULES]
        if unknown:
            raise ValueError(f"There is no rule {unknown[0]!r}; choose of {', '.join(RULES)}.")


def apply_rule(model: PeftModel, rule: Rule) -> None:
    """Scales every delta, and A, by `rule`; the adapters must be new."""
    for module in model.modules():
        if isinstance(module, CoLoRALayer) and "default" in module.rank:
            weight = module.get_base_layer().weight
            k = weight.numel() // weight.shape[0]
            if "default" in module.colora_dense:
                module.scaling["default"] = rule.dense(k)
            else:
                module.scaling["default"] = rule.factors(module.rank["default"], k)
                torch.nn.init.normal_(module.colora_A["default"], std=rule.std(k))


def settings_of(args: ScalingArguments, rule: str, rank: str, learning_rate: float, seed: int) -> Cell:
    """All settings that decide a cell. Cells with equal settings are the same cell."""
    settings = {
        "task": task_name(args.train_dir),
        "model_sha256": network_fingerprint(args.model_name_or_path),
        "rule": rule,
        "rank": rank,
        "learning_rate": learning_rate,
        "seed": seed,
        **{name: getattr(args, name) for name in SHARED},
    }
    mix = {
        "parameter_budget": args.parameter_budget,
        "beta": CoLoRAConfig.beta,
        "estimator": args.estimator,
    }
    return settings | (mix if rank == MIX else {})


class Known(NamedTuple):
    """Figures that the cells of a seed share, by seed."""

    scores: dict[int, dict[str, float]]
    """Contributions."""
    before: dict[int, Cell]
    """Quality of the untrained network."""


def run_cell(settings: Cell, args: ScalingArguments, accelerator: Accelerator, known: Known) -> Cell:
    """Trains once; returns PSNR on the pairs to validate on (`psnr`) and on those trained on (`train_psnr`).

    The latter shows more surely how far the optimiser came.
    """
    seed = settings["seed"]
    set_seed(seed)
    chosen, validation = split_pairs(args.train_dir, args.train_pairs, args.validation_pairs, seed)
    model = load_network(args.model_name_or_path, accelerator)
    with tempfile.TemporaryDirectory() as folder:
        run = run_arguments(args, folder, settings["learning_rate"], seed)
        patches = PairedPatches(chosen, run.resolution, seed)
        if seed not in known.before:
            known.before[seed] = quality_before(model, chosen, validation, accelerator)
        if settings["rank"] == MIX:
            if seed not in known.scores:
                known.scores[seed] = measure_contributions(
                    model, patches, replace(run, estimator=args.estimator), accelerator
                ).scores
            config = CoLoRAConfig(contributions=known.scores[seed], parameter_budget=args.parameter_budget)
        else:
            config = CoLoRAConfig(ranks=DENSE if settings["rank"] == "dense" else int(settings["rank"]))
        model = get_peft_model(model, config)
        set_seed(seed)
        apply_rule(model, RULES[settings["rule"]])
        cell = train_and_validate(model, patches, validation, run, accelerator)
    if "failed" not in cell:
        cell["train_psnr"] = evaluate(model, chosen, accelerator.device, "")["psnr"]
    return {**cell, **known.before[seed]}


def quality_before(model: nn.Module, chosen: PairSource, validation: PairSource, accelerator: Accelerator) -> Cell:
    """Mean PSNR (dB) of the untrained network on the pairs to train on and on the others."""
    sources = {"train_psnr_before": chosen, "psnr_before": validation}
    return {name: evaluate(model, pairs, accelerator.device, "")["psnr"] for name, pairs in sources.items()}


# ----------------------------------------------------------------------------------------------------------- report


def optimum(psnr: dict[float, float]) -> float:
    """Learning rate at the top of the parabola, over its logarithm, through the best point and its neighbours.

    NaN where the best point is the first or the last: then the top lies outside.
    """
    rates = sorted(psnr)
    best = max(range(len(rates)), key=lambda index: psnr[rates[index]])
    if not 0 < best < len(rates) - 1:
        return math.nan
    x = [math.log(rate) for rate in rates[best - 1 : best + 2]]
    y = [psnr[rate] for rate in rates[best - 1 : best + 2]]
    left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    curvature = (right - left) / (x[2] - x[0])
    if curvature == 0:
        return rates[best]
    return math.exp((x[0] + x[1]) / 2 - left / (2 * curvature))


def kept_gain(psnr: dict[float, float], psnr_before: float, factor: float = 4.0) -> float:
    """The smallest share of the best gain (dB over the untrained network) within the best range of learning rates.

    The range spans `factor`; of all such ranges of the grid the one is taken that keeps the most.
    """
    rates, best = sorted(psnr), max(psnr.values()) - psnr_before
    kept = [
        min(psnr[rate] for rate in rates if low <= rate <= factor * low * 1.001) - psnr_before
        for low in rates
        if factor * low <= rates[-1] * 1.001
    ]
    return max(kept, default=math.nan) / best


def report(cells: list[Cell]) -> str:
    """Markdown: for each task and rule, tables of rank against learning rate, and what they say."""
    text = []
    groups: dict[tuple[object, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(tuple(cell[name] for name in ("task", "rule", *SHARED)), []).append(cell)
    for (task, rule, *shared), own in groups.items():
        settings = ", ".join(f"{name} {value}" for name, value in zip(SHARED, shared, strict=True))
        text.append(f"## {task}, {rule}\n\n{settings}, seeds {sorted({cell['seed'] for cell in own})}.\n")
        for what, title in (("train_psnr", "Pairs trained on"), ("psnr", "Other pairs")):
            text.append(f"{title}:\n\n{rule_table(own, what)}\n")
    return "\n".join(text)


def rule_table(cells: list[Cell], what: str) -> str:
    """Markdown: the mean over the seeds of the figure `what` (dB) by rank and learning rate, and where it is highest.

    Rates count that all seeds have.
    """
    rates, seeds = sorted({cell["learning_rate"] for cell in cells}), {cell["seed"] for cell in cells}
    lines, optima = [], {}
    for rank in dict.fromkeys(row_name(cell) for cell in cells):
        own = [cell for cell in cells if row_name(cell) == rank]
        psnr = {}
        for rate in rates:
            values = {cell["seed"]: cell.get(what, math.nan) for cell in own if cell["learning_rate"] == rate}
            if values.keys() == seeds and not any(math.isnan(value) for value in values.values()):
                psnr[rate] = mean(values.values())
        shown = [f"{psnr[rate]:.2f}" if rate in psnr else "" for rate in rates]
        optima[rank] = optimum(psnr) if psnr else math.nan
        kept = kept_gain(psnr, mean(cell[f"{what}_before"] for cell in own)) if psnr else math.nan
        lines.append([rank, *shown, _shown(optima[rank], ".1e"), _shown(kept, ".0%")])
    text = markdown_table(["rank", *(f"{rate:g}" for rate in rates), "optimum", "kept over 4x"], lines)
    if "1" in optima and "dense" in optima:
        text += f"\n\nOptimum of rank 1 over that of dense: {_shown(optima['1'] / optima['dense'], '.2f')}."
    return text


def row_name(cell: Cell) -> str:
    """Rank, and how a mix was made: mixes of different estimators are different rows."""
    if cell["rank"] != MIX:
        return cell["rank"]
    return f"{MIX} ({cell['estimator']}, {cell['parameter_budget']:.0%}, beta {cell['beta']:g})"


def _shown(value: float, form: str) -> str:
    return "outside" if math.isnan(value) else format(value, form)


def main(args: ScalingArguments) -> None:
    """Runs the cells that the file lacks and writes the report of all."""
    accelerator = Accelerator()
    use_all_cores(accelerator)
    file = CellFile(args.results)
    known = Known({}, {})
    grid = list(product(args.seeds, args.rules, args.learning_rates, args.ranks))
    for seed, rule, rate, rank in own_part(grid, args.part):
        settings = settings_of(args, rule, rank, rate, seed)
        if file.find(settings) is None:
            cell = {**settings, **run_cell(settings, args, accelerator, known)}
            file.add(cell)
            print(f"{rule}, rank {rank}, {rate:g}, seed {seed}: {cell.get('psnr', math.nan):.2f} dB", flush=True)
    text = report(CellFile(args.results).cells)  # with those of other processes
    write_text(file.path.with_name("report.md"), text)
    print(f"\n{text}")


if __name__ == "__main__":
    run_script(main, ScalingArguments, DataFailed)
