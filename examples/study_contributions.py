"""Where should the capacity go? Contribution estimators, exponents and budgets, held against uniform ranks.

    python examples/study_contributions.py --train_dirs path/to/underwater/train path/to/noise/train path/to/rain/train

Each folder TASK/train has a TASK/test beside it. Every method is tuned alike, on each task: its learning rate is the
best of --learning_rates on held-out pairs of the training folder, with a seed of its own; what is reported is the mean
PSNR on the test folder over other seeds, at that rate. Adapters are tuned at --tuned_budgets, uniform ranks and CoLoRA
with the default estimator; other budgets take the rate of the nearest, other scores and exponents that of the default.
The seed draws pairs, patches and adapters, so that variants compare seed by seed. Fisher scores are squares, so they
get half the exponent of the others. Pictures are evaluated on their centres, which is what makes the study affordable.

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
    PairCentres,
    load_network,
    network_fingerprint,
    own_part,
    run_arguments,
    split_pairs,
    task_name,
    train_and_validate,
)
from restoration_task import measure_contributions
from study_report import BUDGET, CELLS_FILE, SCORES_FOLDER, SETTINGS_FILE, chosen_rate, others_of, write_report
from torch import nn
from transformers import HfArgumentParser

from colora_peft import (
    CoLoRAConfig,
    ContributionScores,
    FaigSettings,
    ProbeSettings,
    adaptable_layers,
    weight_matrix_shape,
)
from colora_peft.allocation import adapter_parameters
from colora_peft.contribution_scores import mean_scores
from colora_peft.files import write_json
from colora_peft.metrics import SSIM_WINDOW_PX
from colora_peft.pairs import PairedImageFolder, PairSource
from colora_peft.patches import PairedPatches
from colora_peft.scaling import adapter_scaling
from colora_peft.train_arguments import check_at_least
from colora_peft.training import TrainingDiverged, train, use_all_cores
from colora_peft.tuning import LEARNING_RATES, prepare_for_tuning

RANDOM = "random"
"""Scores of the default estimator, dealt out to the layers at random."""
SAME_RANK = "same_rank"
"""A method: one rank for every layer, as high as the budget allows; "lora" gives every layer the same share."""
ESTIMATORS = ("probe", "gradient", "taylor", "fisher", "faig", RANDOM)


@dataclass
class StudyArguments:
    """Flags of the study."""

    train_dirs: list[str] = field(metadata={"help": "One folder TASK/train for each task, TASK/test beside it."})
    questions: list[str] = field(
        default_factory=lambda: ["estimators", "budgets", "same_rank", "betas", "transfer"],
        metadata={"help": "What to run."},
    )
    estimators: list[str] = field(default_factory=lambda: list(ESTIMATORS), metadata={"help": "For `estimators`."})
    budgets: list[float] = field(
        default_factory=lambda: [0.02, 0.01, 0.035, 0.14], metadata={"help": f"For `budgets`, besides {BUDGET:g}."}
    )
    betas: list[float] = field(
        default_factory=lambda: [0.25, 0.75, 1.0], metadata={"help": "For `betas`, besides 0 (uniform) and 0.5."}
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [5e-4, 1e-3, 2e-3, 4e-3, 8e-3], metadata={"help": "Tried with the tuning seed."}
    )
    tuned_budgets: list[float] = field(
        default_factory=lambda: [0.02, 0.07], metadata={"help": "At which rates are tried, for uniform and CoLoRA."}
    )
    tuning_seed: int = field(default=100, metadata={"help": "Of pairs, patches and adapters to try rates with."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of pairs, patches and adapters."})
    default_estimator: str = field(default="gradient", metadata={"help": "Of all questions but `estimators`."})
    max_train_steps: int = field(default=200, metadata={"help": "Steps of each cell."})
    resolution: int = field(default=64, metadata={"help": "Side of the patches."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Patches a step."})
    train_pairs: int = field(default=16, metadata={"help": "Pairs to train on, drawn by the seed."})
    validation_pairs: int = field(default=18, metadata={"help": "Other pairs of --train_dirs, for the rates."})
    evaluated_size: int = field(default=256, metadata={"help": "Side of the centres that PSNR is measured on."})
    part: str = field(default="0/1", metadata={"help": "Run this part of the tasks only, as in 0/3, 1/3 and 2/3."})
    output_dir: str = field(default=str(RESULTS / "contributions"), metadata={"help": "For cells, scores, report."})

    def __post_init__(self) -> None:
        lists = {name: getattr(self, name) for name in ("seeds", "learning_rates", "tuned_budgets")}
        for name, values in {"train_dirs": [task_name(folder) for folder in self.train_dirs], **lists}.items():
            if not values or len(set(values)) < len(values):
                raise ValueError(f"--{name} must list at least one value and none twice, got {values}.")
        check_at_least(self, "evaluated_size", SSIM_WINDOW_PX)
        if self.tuning_seed in self.seeds:
            raise ValueError(f"--tuning_seed {self.tuning_seed} is one of --seeds: choose another.")

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

    def tuned_as(self, args: StudyArguments) -> Variant:
        """The variant whose learning rate this one takes."""
        if self.parameter_budget is None:
            return self
        nearest = min(args.tuned_budgets, key=lambda budget: abs(math.log(budget / self.parameter_budget)))
        return {"lora": uniform, SAME_RANK: same_rank, "colora": colora}[self.method](args, self.task, nearest)


def uniform(args: StudyArguments, task: str, budget: float = BUDGET) -> Variant:
    return Variant(task, "lora", budget)


def same_rank(args: StudyArguments, task: str, budget: float = BUDGET) -> Variant:
    return Variant(task, SAME_RANK, budget)


def colora(args: StudyArguments, task: str, budget: float = BUDGET) -> Variant:
    """With the defaults of the study."""
    return Variant(task, "colora", budget, args.default_estimator, beta_for(args.default_estimator), task)


def plan(args: StudyArguments) -> list[Variant]:
    """All variants in the order in which they are run: what answers most comes first."""
    variants = []
    for question in args.questions:
        for task in args.tasks():
            variants += variants_of(question, task, args)
    return list(dict.fromkeys(variants))


def variants_of(question: str, task: str, args: StudyArguments) -> list[Variant]:
    default = colora(args, task)
    if question == "estimators":
        others = [default._replace(estimator=name, beta=beta_for(name)) for name in args.estimators]
        return [uniform(args, task), default, Variant(task, "full"), *others]
    if question == "budgets":
        return [of(args, task, budget) for budget in args.budgets for of in (uniform, colora)]
    if question == SAME_RANK:
        return [same_rank(args, task, budget) for budget in args.tuned_budgets]
    if question == "betas":
        return [uniform(args, task), default, *(default._replace(beta=beta) for beta in args.betas)]
    if question == "transfer":
        others = others_of(task, list(args.tasks()))
        return [default._replace(scores_of=source) for source in ([others] if others else []) + list(args.tasks())]
    raise ValueError(f"There is no question {question!r}: choose of estimators, budgets, same_rank, betas, transfer.")


def beta_for(estimator: str, beta: float = CoLoRAConfig.beta) -> float:
    """The exponent that does to an estimator's scores what `beta` does to those that are no squares."""
    return beta / 2 if estimator == "fisher" else beta


# ------------------------------------------------------------------------------------------------------------ cells


class Draw(NamedTuple):
    """What a task and a seed decide."""

    patches: PairedPatches
    evaluated: PairSource
    """The test folder; for the tuning seed, pairs held out of the training folder."""


def draw(args: StudyArguments, task: str, seed: int) -> Draw:
    folder = args.tasks()[task]
    chosen, held_out = split_pairs(folder, args.train_pairs, args.validation_pairs, seed, "drawn")
    evaluated = held_out if seed == args.tuning_seed else PairedImageFolder(Path(folder).parent / "test")
    return Draw(PairedPatches(chosen, args.resolution, seed), PairCentres(evaluated, args.evaluated_size))


def shared_settings(args: StudyArguments) -> Cell:
    """What all cells and scores of a study have in common."""
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
        "model_sha256": network_fingerprint(),
        **{name: getattr(args, name) for name in (*names, "learning_rates", "default_estimator")},
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
    """Train once; PSNR on the test folder, or for the tuning seed on pairs held out of the training folder.

    A run that diverges, also one of an estimate before it, is a cell that says so under `failed`.
    """
    drawn, settings = draw(args, variant.task, seed), cell_settings(variant, rate, seed)
    try:
        return {**settings, **tuned_cell(args, variant, drawn, rate, seed, accelerator)}
    except TrainingDiverged as error:
        return {**settings, "failed": str(error)}


def tuned_cell(
    args: StudyArguments, variant: Variant, drawn: Draw, rate: float, seed: int, accelerator: Accelerator
) -> Cell:
    config = CoLoRAConfig(parameter_budget=variant.parameter_budget or BUDGET)
    if variant.method == "colora":
        scores = contributions_of(args, variant, seed, accelerator).scores
        config = replace(config, contributions=scores, beta=variant.beta)
    network = load_network(accelerator)
    if variant.method == SAME_RANK:
        config = replace(config, ranks=common_rank(network, variant.parameter_budget))
    set_seed(seed)
    model = prepare_for_tuning(network, "colora" if variant.method == SAME_RANK else variant.method, config)
    with tempfile.TemporaryDirectory() as folder:
        run = run_arguments(args, folder, rate, seed)
        return train_and_validate(model, drawn.patches, drawn.evaluated, run, accelerator)


def common_rank(network: nn.Module, budget: float) -> int:
    """The highest rank that all layers can have under the budget."""
    shapes = [weight_matrix_shape(layer) for layer in adaptable_layers(network).values()]
    allowed = budget * sum(d * k for d, k in shapes)
    rank = 1
    while sum(adapter_parameters(rank + 1, d, k) for d, k in shapes) <= allowed:
        rank += 1
    if sum(adapter_parameters(rank, d, k) for d, k in shapes) > allowed:
        raise ValueError(f"A budget of {budget:g} does not pay for rank 1 in every layer: raise --tuned_budgets.")
    return rank


def run_variants(args: StudyArguments, variants: list[Variant], file: CellFile, accelerator: Accelerator) -> None:
    """Choose each learning rate with the tuning seed, then run the others at it: variant by variant, seed by seed."""
    for variant in variants:
        tuned = variant.tuned_as(args)
        tuning = [cell_of(args, tuned, rate, args.tuning_seed, file, accelerator) for rate in args.learning_rates]
        best = chosen_rate(tuning)
        if best is None:
            print(f"{variant}: left out, as every learning rate failed.", flush=True)
            continue
        for seed in args.seeds:
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
        seconds = time.perf_counter() - started
        outcome = cell["failed"] if "failed" in cell else f"{cell['psnr']:.2f} dB"
        print(f"{text}, {rate:g}, seed {seed}: {outcome} ({seconds:.0f} s)", flush=True)
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
