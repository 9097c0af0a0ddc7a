"""The contribution scores of the study, measured once for a task, an estimator and a seed, then kept."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from colora_peft import CoLoRAConfig, ContributionScores
from colora_peft.data import PairedPatches
from colora_peft.ranks import mean_scores
from colora_peft.training import LEARNING_RATES, prepare_for_tuning, train
from examples.experiments.contributions.plan import RANDOM, StudyArguments, Variant
from examples.experiments.contributions.report import SCORES_FOLDER
from examples.experiments.grid.cells import load_network, measure_contributions, run_arguments
from examples.experiments.grid.tuned import draw


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
    """Estimate on the first patches of the run, as finetune.py does. The seconds of "faig" include its full tuning."""
    started = time.perf_counter()
    patches = draw(args, args.tasks()[task], args.train_pairs, seed).patches
    run = replace(run_arguments(args, "", LEARNING_RATES["full"], seed), estimator=estimator)
    network = load_network(args.model_name_or_path, accelerator)
    end = tuned_network(args, patches, seed, accelerator).state_dict() if estimator == "faig" else None
    set_seed(seed)
    scores = measure_contributions(network, patches, run, accelerator, end)
    return replace(scores, seconds=time.perf_counter() - started)


def tuned_network(args: StudyArguments, patches: PairedPatches, seed: int, accelerator: Accelerator) -> nn.Module:
    """The network after full tuning, where FAIG's path ends."""
    network = prepare_for_tuning(load_network(args.model_name_or_path, accelerator), "full", CoLoRAConfig())
    with tempfile.TemporaryDirectory() as folder:
        run = run_arguments(args, folder, LEARNING_RATES["full"], seed)
        network, _ = train(network, patches, run, accelerator)
    accelerator.free_memory()
    return network
