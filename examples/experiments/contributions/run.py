"""Where should the capacity go? Estimators, exponents and budgets, compared with the same rank for all layers.

    python -m examples.experiments.contributions.run --train_dirs DATA/noise/train DATA/rain/train

Each folder TASK/train has a TASK/test beside it. Every method is tuned alike, on each task: its learning rate is the
best of --learning_rates on held-out pairs of the training folder, with a seed of its own. The report has the mean PSNR
on the test folder over other seeds, at that rate. Rates are tried at --tuned_budgets, for CoLoRA with the default
estimator; other budgets take the rate of the nearest, other scores and exponents that of the default. The seed draws
pairs, patches and adapters, so that variants compare seed by seed. Images are evaluated on their centres.

Cells and scores are kept and not measured again: the study grows over many calls, and several processes may share the
work (--part 0/3, 1/3 and 2/3). Each call ends by writing the tables and plots of all cells.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from colora_peft import CoLoRAConfig, ContributionScores, FaigSettings, ProbeSettings
from colora_peft.data import PairedPatches
from colora_peft.ranks import mean_scores
from colora_peft.training import DataFailed, prepare_for_tuning, train, use_all_cores
from colora_peft.utils import run_script
from examples.experiments.contributions.plan import RANDOM, SAME_SHARE, StudyArguments, Variant, plan
from examples.experiments.contributions.report import BUDGET, SCORES_FOLDER, write_report
from examples.experiments.grid.cells import (
    Cell,
    CellFile,
    FinetuneArguments,
    load_network,
    measure_contributions,
    network_fingerprint,
    own_part,
    run_arguments,
    train_and_validate,
)
from examples.experiments.grid.tuned import CELLS_FILE, TunedGrid, check_same_settings, draw, method_settings

FAIG_LEARNING_RATE = 3e-3
"""Learning rate of the full tuning where FAIG's path ends; all cells have it, whatever finetune.py has by now."""


def shared_settings(args: StudyArguments) -> Cell:
    """Settings that all cells and scores of a study have in common."""
    names = (
        "max_train_steps",
        "resolution",
        "per_device_train_batch_size",
        "train_pairs",
        "validation_pairs",
        "evaluated_size",
        "tuned_budgets",
        "tuning_seed",
    )
    return {
        "model_sha256": network_fingerprint(args.model_name_or_path),
        **{name: getattr(args, name) for name in (*names, "default_estimator")},
        **method_settings(),
        "probe": asdict(ProbeSettings()),
        "faig": {**asdict(FaigSettings()), "learning_rate": FAIG_LEARNING_RATE},
        "probe_batches": FinetuneArguments.probe_batches,
    }


# ----------------------------------------------------------------------------------------------------------- scores


def contributions_of(
    args: StudyArguments, variant: Variant, seed: int, accelerator: Accelerator
) -> ContributionScores:
    """Scores of the variant's estimator on the pairs of its `scores_of` task and the seed; kept in a file."""
    if variant.estimator == RANDOM:
        measured = contributions_of(args, variant._replace(estimator=args.default_estimator), seed, accelerator)
        values = list(measured.scores.values())
        order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed)).tolist()
        return replace(measured, scores={name: values[i] for name, i in zip(measured.scores, order, strict=True)})
    if "+" in variant.scores_of:
        others = variant.scores_of.split("+")
        found = [contributions_of(args, variant._replace(scores_of=task), seed, accelerator) for task in others]
        return replace(found[0], scores=mean_scores(found))
    path = Path(args.output_dir) / SCORES_FOLDER / f"{variant.scores_of}-{variant.estimator}-seed{seed}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        measure(args, variant.scores_of, variant.estimator, seed, accelerator).save(path)
    return ContributionScores.load(path)


def measure(
    args: StudyArguments, task: str, estimator: str, seed: int, accelerator: Accelerator
) -> ContributionScores:
    """Estimates on the first patches of the run, as finetune.py does. Seconds of "faig" include its full tuning."""
    started = time.perf_counter()
    patches = draw(args, args.tasks()[task], args.train_pairs, seed).patches
    run = replace(run_arguments(args, "", FAIG_LEARNING_RATE, seed), estimator=estimator)
    network = load_network(args.model_name_or_path, accelerator)
    end = tuned_network(args, patches, seed, accelerator).state_dict() if estimator == "faig" else None
    set_seed(seed)
    scores = measure_contributions(network, patches, run, accelerator, end)
    return replace(scores, seconds=time.perf_counter() - started)


def tuned_network(args: StudyArguments, patches: PairedPatches, seed: int, accelerator: Accelerator) -> nn.Module:
    """The network after full tuning, where FAIG's path ends."""
    network = prepare_for_tuning(load_network(args.model_name_or_path, accelerator), "full", CoLoRAConfig())
    with tempfile.TemporaryDirectory() as folder:
        run = run_arguments(args, folder, FAIG_LEARNING_RATE, seed)
        network, _ = train(network, patches, run, accelerator)
    accelerator.free_memory()
    return network


# ------------------------------------------------------------------------------------------------------------ cells


def run_cell(args: StudyArguments, variant: Variant, rate: float, seed: int, accelerator: Accelerator) -> Cell:
    """Trains once; returns PSNR on the test folder, for the tuning seed on pairs held out of the training folder."""
    drawn = draw(args, args.tasks()[variant.task], args.train_pairs, seed)
    config = CoLoRAConfig(parameter_budget=variant.parameter_budget or BUDGET, beta=0.0)
    if variant.method == "colora":
        scores = contributions_of(args, variant, seed, accelerator).scores
        floor = {".*": variant.min_rank} if variant.min_rank else {}
        config = replace(config, contributions=scores, beta=variant.beta, min_rank_pattern=floor)
    set_seed(seed)
    method = "colora" if variant.method == SAME_SHARE else variant.method
    model = prepare_for_tuning(load_network(args.model_name_or_path, accelerator), method, config)
    with tempfile.TemporaryDirectory() as folder:
        run = run_arguments(args, folder, rate, seed)
        return train_and_validate(model, drawn.patches, drawn.evaluated, run, accelerator)


def main(args: StudyArguments) -> None:
    """Runs the cells that the folder lacks and writes the report of all."""
    accelerator = Accelerator()
    use_all_cores(accelerator)
    folder = Path(args.output_dir)
    check_same_settings(folder, shared_settings(args))
    # By task: what is compared then runs on one machine.
    tasks = own_part(list(args.tasks()), args.part)
    variants = [variant for variant in plan(args) if variant.task in tasks]
    run = partial(run_cell, args, accelerator=accelerator)
    TunedGrid(args, CellFile(folder / CELLS_FILE), lambda variant: variant.tuned_as(args), run).run(variants)
    print(write_report(folder))


if __name__ == "__main__":
    run_script(main, StudyArguments, DataFailed)
