"""The plan of study_contributions.py: its flags, what it compares, and in which order."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from grid_cells import RESULTS, Cell, task_name
from study_report import BUDGET, others_of

from colora_peft import CoLoRAConfig
from colora_peft.evaluation import SSIM_WINDOW_PX
from colora_peft.utils import check_at_least

RANDOM = "random"
"""Scores of the default estimator, dealt out to the layers at random."""
SAME_SHARE = "same_share"
"""A method: CoLoRA with beta = 0; "lora" gives every layer the same rank."""
QUESTIONS = ("estimators", "budgets", "same_rank", "floor", "betas", "transfer")
ESTIMATORS = ("probe", "gradient", "taylor", "fisher", "faig", RANDOM)


@dataclass
class StudyArguments:
    """Flags of the study."""

    train_dirs: list[str] = field(metadata={"help": "One folder TASK/train for each task, TASK/test beside it."})
    questions: list[str] = field(default_factory=lambda: list(QUESTIONS), metadata={"help": "What to run."})
    estimators: list[str] = field(default_factory=lambda: list(ESTIMATORS), metadata={"help": "For `estimators`."})
    budgets: list[float] = field(
        default_factory=lambda: [0.02, 0.01, 0.035, 0.14], metadata={"help": f"For `budgets`, besides {BUDGET:g}."}
    )
    betas: list[float] = field(
        default_factory=lambda: [0.25, 0.75, 1.0],
        metadata={"help": "For `betas`, besides 0 and 0.5."},
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [5e-4, 1e-3, 2e-3, 4e-3, 8e-3], metadata={"help": "Tried with the tuning seed."}
    )
    tuned_budgets: list[float] = field(
        default_factory=lambda: [0.02, 0.07], metadata={"help": "At which rates are tried, but for full tuning."}
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
    """As in `colora_peft.training.methods`, or SAME_SHARE."""
    parameter_budget: float | None = None
    estimator: str | None = None
    """Or RANDOM."""
    beta: float | None = None
    scores_of: str | None = None
    """Task that the scores are of."""
    min_rank: int | None = None
    """Rank that every layer gets before contribution counts."""

    def settings(self) -> Cell:
        return {name: value for name, value in self._asdict().items() if value is not None}

    def tuned_as(self, args: StudyArguments) -> Variant:
        """The variant whose learning rate this one takes."""
        if self.parameter_budget is None:
            return self
        nearest = min(args.tuned_budgets, key=lambda budget: abs(math.log(budget / self.parameter_budget)))
        if self.method != "colora":
            return self._replace(parameter_budget=nearest)
        return colora(args, self.task, nearest)._replace(min_rank=self.min_rank)


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
        return [Variant(task, SAME_SHARE, BUDGET), default, Variant(task, "full"), *others]
    if question == "budgets":
        return [
            variant
            for budget in args.budgets
            for variant in (Variant(task, SAME_SHARE, budget), colora(args, task, budget))
        ]
    if question == "same_rank":
        return [Variant(task, "lora", budget) for budget in args.tuned_budgets]
    if question == "floor":
        return [colora(args, task, budget)._replace(min_rank=1) for budget in args.tuned_budgets]
    if question == "betas":
        return [Variant(task, SAME_SHARE, BUDGET), default, *(default._replace(beta=beta) for beta in args.betas)]
    if question == "transfer":
        others = others_of(task, list(args.tasks()))
        return [default._replace(scores_of=source) for source in ([others] if others else []) + list(args.tasks())]
    raise ValueError(f"There is no question {question!r}: choose of {', '.join(QUESTIONS)}.")


def beta_for(estimator: str, beta: float = CoLoRAConfig.beta) -> float:
    """The exponent that does to an estimator's scores what `beta` does to those that are no squares."""
    return beta / 2 if estimator == "fisher" else beta
