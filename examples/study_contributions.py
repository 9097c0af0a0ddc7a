"""Where should the capacity go? Contribution estimators, exponents and budgets, held against uniform ranks.

    python examples/study_contributions.py --train_dirs path/to/underwater/train path/to/noise/train path/to/rain/train

Each folder TASK/train has a TASK/test beside it. Every variant is tuned alike: its learning rate is the best of
--learning_rates on held-out pairs of the training folder, for the first seed; what is reported is the mean PSNR on
the test folder over all seeds. The seed draws pairs, patches and adapters, so that variants compare seed by seed.
Fisher scores are squares, so they get half the exponent of the others.

Cells and scores are kept and not measured again: the study grows over many calls, and several processes may share the
work (--part 0/3, 1/3 and 2/3, say). Each call ends by writing the tables and plots of all cells that it knows.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from finetune import FinetuneArguments
from grid_cells import (
    RESULTS,
    Cell,
    CellFile,
    load_network,
    network_fingerprint,
    own_part,
    run_arguments,
    split_pairs,
    task_name,
    train_and_validate,
)
from restoration_task import measure_contributions
from study_report import CELLS_FILE, SCORES_FOLDER, SETTINGS_FILE, chosen_rate, write_report
from torch import nn
from transformers import HfArgumentParser

from colora_peft import CoLoRAConfig, ContributionScores, FaigSettings, ProbeSettings
from colora_peft.evaluation import evaluate
from colora_peft.files import write_json
from colora_peft.pairs import PairedImageFolder, PairSource
from colora_peft.patches import PairedPatches
from colora_peft.scaling import adapter_scaling
from colora_peft.training import TrainingDiverged, train, use_all_cores
from colora_peft.tuning import LEARNING_RATES, prepare_for_tuning

RANDOM = "random"
"""Scores of the default estimator, dealt out to the layers at random."""
ESTIMATORS = ("probe", "gradient", "taylor", "fisher", "faig", RANDOM)


@dataclass
class StudyArguments:
    """Flags of the study."""

    train_dirs: list[str] = field(metadata={"help": "One folder TASK/train for each task, TASK/test beside it."})
    questions: list[str] = field(
        default_factory=lambda: ["estimators", "budgets", "betas", "transfer"], metadata={"help": "What to run."}
    )
    estimators: list[str] = field(default_factory=lambda: list(ESTIMATORS), metadata={"help": "For `estimators`."})
    budgets: list[float] = field(
        default_factory=lambda: [0.02, 0.01, 0.035, 0.14], metadata={"help": "For `budgets`, besides 0.07."}
    )
    betas: list[float] = field(
        default_factory=lambda: [0.25, 0.75, 1.0], metadata={"help": "For `betas`, besides 0 (uniform) and 0.5."}
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [1.5e-3, 3e-3, 6e-3, 1.2e-2], metadata={"help": "Tried with the first seed."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of pairs, patches and adapters."})
    default_estimator: str = field(default="probe", metadata={"help": "Of all questions but `estimators`."})
    max_train_steps: int = field(default=300, metadata={"help": "Steps of each cell."})
    resolution: int = field(default=64, metadata={"help": "Side of the patches."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Patches a step."})
    train_pairs: int = field(default=16, metadata={"help": "Pairs to train on, drawn by the seed."})
    validation_pairs: int = field(default=18, metadata={"help": "Other pairs of --train_dirs, for the rates."})
    part: str = field(default="0/1", metadata={"help": "Run this part of the tasks only, as in 0/3, 1/3 and 2/3."})
    output_dir: str = field(default=str(RESULTS / "contributions"), metadata={"help": "For cells, scores, report."})

    def __post_init__(self) -> None:
        for name, values in (("train_dirs", [task_name(f) for f in self.train_dirs]), ("seeds", self.seeds),
                             ("learning_rates", self.learning_rates)):  # fmt: skip
            if not values or len(set(values)) < len(values):
                raise ValueError(f"--{name} must list at least one value and none twice, got {values}.")

    def tasks(self) -> dict[str, str]:
        """Training folder of each task."""
        return {task_name(folder): folder for folder in self.train_dirs}


class Variant(NamedTuple):
    """What is compared, on one task."""

    task: str
    method: str
    """As in `colora_peft.tuning`."""
    parameter_budget: float | None = None
    estimator: str | None = None
    """Or RANDOM."""
    beta: float | None = None
    scores_of: str | None = None
    """Task that the scores are of."""

    def settings(self) -> Cell:
        return {name: value for name, value in self._asdict().items() if value is not None}


def plan(args: StudyArguments) -> list[Variant]:
    """All variants in the order in which they are run: what answers most comes first."""
    variants = []
    for question in args.questions:
        for task in args.tasks():
            variants += variants_of(question, task, args)
    return list(dict.fromkeys(variants))


def variants_of(question: str, task: str, args: StudyArguments) -> list[Variant]:
    uniform = Variant(task, "lora", 0.07)
    colora = Variant(task, "colora", 0.07, args.default_estimator, beta_for(args.default_estimator), task)
    if question == "estimators":
        others = [colora._replace(estimator=name, beta=beta_for(name)) for name in args.estimators]
        return [uniform, colora, Variant(task, "full"), *others]
    if question == "budgets":
        return [v._replace(parameter_budget=budget) for budget in args.budgets for v in (uniform, colora)]
    if question == "betas":
        return [uniform, colora, *(colora._replace(beta=beta) for beta in args.betas)]
    if question == "transfer":
        return [colora._replace(scores_of=other) for other in args.tasks()]
    raise ValueError(f"There is no question {question!r}: choose of estimators, budgets, betas, transfer.")


def beta_for(estimator: str, beta: float = CoLoRAConfig.beta) -> float:
    """The exponent that does to an estimator's scores what `beta` does to those that are no squares."""
    return beta / 2 if estimator == "fisher" else beta


# ------------------------------------------------------------------------------------------------------------ cells


class Draw(NamedTuple):
    """What a task and a seed decide."""

    patches: PairedPatches
    validation: PairSource
    test: PairSource


def draw(args: StudyArguments, task: str, seed: int) -> Draw:
    folder = args.tasks()[task]
    chosen, validation = split_pairs(folder, args.train_pairs, args.validation_pairs, seed, "drawn")
    test = PairedImageFolder(Path(folder).parent / "test")
    return Draw(PairedPatches(chosen, args.resolution, seed), validation, test)


def shared_settings(args: StudyArguments) -> Cell:
    """What all cells and scores of a study have in common."""
    names = ("max_train_steps", "resolution", "per_device_train_batch_size", "train_pairs", "validation_pairs")
    return {
        "model_sha256": network_fingerprint(),
        **{name: getattr(args, name) for name in (*names, "learning_rates", "default_estimator")},
        "first_seed": args.seeds[0],
        "beta": CoLoRAConfig.beta,
        "colora_alpha": CoLoRAConfig.colora_alpha,
        "scaling": [adapter_scaling(*shape, CoLoRAConfig.colora_alpha) for shape in ((1, 64, 144), (64, 64, 144))],
        "probe": asdict(ProbeSettings()),
        "faig": {**asdict(FaigSettings()), "learning_rate": LEARNING_RATES["full"]},
        "probe_batches": FinetuneArguments.probe_batches,
    }


def check_same_study(args: StudyArguments) -> None:
    """Refuse a folder of cells and scores that were made with other settings.

    Raises:
        ValueError: It holds such; names the setting.
    """
    path, own = Path(args.output_dir) / SETTINGS_FILE, shared_settings(args)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, own)
    found = json.loads(path.read_text(encoding="utf-8"))
    for name in {**found, **own}:
        if found.get(name) != own.get(name):
            raise ValueError(
                f"--output_dir {args.output_dir} holds a study with {name} {found.get(name)}, not {own.get(name)}: "
                "choose another."
            )


def cell_settings(variant: Variant, learning_rate: float, seed: int) -> Cell:
    """What decides the outcome of a cell besides the settings that the whole study shares."""
    return {**variant.settings(), "learning_rate": learning_rate, "seed": seed}


def run_cell(args: StudyArguments, variant: Variant, rate: float, seed: int, accelerator: Accelerator) -> Cell:
    """Train once; PSNR on the pairs held out of the training folder (`psnr`) and on the test folder (`test_psnr`).

    A run, or an estimate before it, that cannot be done is a cell that says why under `failed`.
    """
    settings = cell_settings(variant, rate, seed)
    try:
        return {**settings, **tuned_cell(args, variant, rate, seed, accelerator)}
    except (TrainingDiverged, ValueError) as error:
        return {**settings, "failed": str(error)}


def tuned_cell(args: StudyArguments, variant: Variant, rate: float, seed: int, accelerator: Accelerator) -> Cell:
    drawn = draw(args, variant.task, seed)
    config = CoLoRAConfig(parameter_budget=variant.parameter_budget or 0.07)
    if variant.method == "colora":
        scores = contributions_of(args, variant, seed, accelerator).scores
        config = replace(config, contributions=scores, beta=variant.beta)
    network = load_network(accelerator)
    set_seed(seed)
    model = prepare_for_tuning(network, variant.method, config)
    with tempfile.TemporaryDirectory() as folder:
        run = run_arguments(args, folder, rate, seed)
        cell = train_and_validate(model, drawn.patches, drawn.validation, run, accelerator)
    if "failed" not in cell:
        quality = evaluate(model, drawn.test, accelerator.device, "")
        cell |= {f"test_{name}": value for name, value in quality.items()}
    return cell


def run_variants(args: StudyArguments, variants: list[Variant], file: CellFile, accelerator: Accelerator) -> None:
    """Choose each learning rate with the first seed, then run the others at it: variant by variant, seed by seed."""
    first, *others = args.seeds
    for variant in variants:
        tuning = [cell_of(args, variant, rate, first, file, accelerator) for rate in args.learning_rates]
        best = chosen_rate(tuning)
        if best is not None:
            for seed in others:
                cell_of(args, variant, best, seed, file, accelerator)


def cell_of(
    args: StudyArguments, variant: Variant, rate: float, seed: int, file: CellFile, accelerator: Accelerator
) -> Cell:
    """The cell, from the file or run now."""
    cell = file.find(cell_settings(variant, rate, seed))
    if cell is None:
        started = time.perf_counter()
        cell = run_cell(args, variant, rate, seed, accelerator)
        file.add(cell)
        text = ", ".join(f"{value}" for value in variant.settings().values())
        figures = f"{cell.get('psnr', math.nan):.2f} dB held out, {cell.get('test_psnr', math.nan):.2f} dB test"
        print(f"{text}, {rate:g}, seed {seed}: {figures} ({time.perf_counter() - started:.0f} s)", flush=True)
    return cell


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
    path = Path(args.output_dir) / SCORES_FOLDER / f"{variant.scores_of}-{variant.estimator}-seed{seed}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        measure(args, variant.scores_of, variant.estimator, seed, accelerator).save(path)
    return ContributionScores.load(path)


def measure(
    args: StudyArguments, task: str, estimator: str, seed: int, accelerator: Accelerator
) -> ContributionScores:
    """Estimate on the first patches of the run, as finetune.py does; "faig" tunes in full first, which counts."""
    started = time.perf_counter()
    patches = draw(args, task, seed).patches
    run = replace(run_arguments(args, "", LEARNING_RATES["full"], seed), estimator=estimator)
    network = load_network(accelerator)
    end = tuned_network(args, patches, seed, accelerator).state_dict() if estimator == "faig" else None
    set_seed(seed)
    scores = measure_contributions(network, patches, run, accelerator, end)
    return replace(scores, seconds=time.perf_counter() - started)


def tuned_network(args: StudyArguments, patches: PairedPatches, seed: int, accelerator: Accelerator) -> nn.Module:
    network = prepare_for_tuning(load_network(accelerator), "full", CoLoRAConfig())
    with tempfile.TemporaryDirectory() as folder:
        run = run_arguments(args, folder, LEARNING_RATES["full"], seed)
        network, _ = train(network, patches, run, accelerator)
    accelerator.free_memory()
    return network


def main(args: StudyArguments) -> None:
    accelerator = Accelerator()
    use_all_cores(accelerator)
    check_same_study(args)
    folder = Path(args.output_dir)
    # By task: what is compared then runs on one machine.
    tasks = own_part(list(args.tasks()), args.part)
    variants = [variant for variant in plan(args) if variant.task in tasks]
    run_variants(args, variants, CellFile(folder / CELLS_FILE), accelerator)
    print(write_report(folder))


if __name__ == "__main__":
    try:
        (parsed,) = HfArgumentParser(StudyArguments).parse_args_into_dataclasses()
        print(f"{asdict(parsed)}\n")
        main(parsed)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"study_contributions.py: {error}")
