"""The plan of the study of contributions: its flags, its variants, and their order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from colora_peft import CoLoRAConfig
from colora_peft.utils import flag
from examples.experiments.contributions.report import BUDGET, others_of
from examples.experiments.grid.cells import NetworkArguments, check_lists, task_name
from examples.experiments.grid.tuned import TunedArguments

RANDOM = "random"
"""Estimator that deals out the scores of the default one to the layers at random."""
SAME_SHARE = "same_share"
"""The method that is CoLoRA with beta = 0; "lora" gives every layer the same rank."""
QUESTIONS = ("estimators", "budgets", "same_rank", "floor", "betas", "transfer")
ESTIMATORS = ("probe", "gradient", "taylor", "fisher", "faig", RANDOM)


@dataclass(kw_only=True)
class StudyArguments(TunedArguments, NetworkArguments):
    """Flags of the study."""

    train_dirs: list[str] = flag(help="Folders TASK/train, one for each task; TASK/test lies beside.")
    questions: list[str] = flag(factory=lambda: list(QUESTIONS), help="Names of the questions to run.")
    estimators: list[str] = flag(factory=lambda: list(ESTIMATORS), help="Estimators of the question `estimators`.")
    budgets: list[float] = flag(
        factory=lambda: [0.02, 0.01, 0.035, 0.14], help=f"Budgets of the question `budgets`, besides {BUDGET:g}."
    )
    betas: list[float] = flag(
        factory=lambda: [0.25, 0.75, 1.0], help="Exponents of the question `betas`, besides 0 and 0.5."
    )
    tuned_budgets: list[float] = flag(
        factory=lambda: [0.02, 0.07], help="Budgets at which learning rates are tried; full tuning has none."
    )
    default_estimator: str = flag("gradient", "Estimator of all questions but `estimators`.")
    output_dir: str = flag(str(Path(__file__).parent), "Folder for cells, scores and report.")

    def __post_init__(self) -> None:
        names = ("seeds", "learning_rates", "tuned_budgets")
        tasks = [task_name(folder) for folder in self.train_dirs]
        check_lists({"train_dirs": tasks, **{name: getattr(self, name) for name in names}})
        super().__post_init__()

    def tasks(self) -> dict[str, str]:
        """Training folder of each task."""
        return {task_name(folder): folder for folder in self.train_dirs}


class Variant(NamedTuple):
    """A way to tune, on one task."""

    task: str
    method: str
    """One of `colora_peft.training.METHODS`, or SAME_SHARE."""
    parameter_budget: float | None = None
    estimator: str | None = None
    """An estimator of the package, or RANDOM."""
    beta: float | None = None
    scores_of: str | None = None
    """Task whose scores decide the ranks."""
    min_rank: int | None = None
    """Rank that every layer gets before contribution counts."""

    def tuned_as(self, args: StudyArguments) -> Variant:
        """The variant whose learning rate this one takes."""
        if self.parameter_budget is None:
            return self
        nearest = min(args.tuned_budgets, key=lambda budget: abs(math.log(budget / self.parameter_budget)))
        if self.method != "colora":
            return self._replace(parameter_budget=nearest)
        return colora(args, self.task, nearest)._replace(min_rank=self.min_rank)


def colora(args: StudyArguments, task: str, budget: float = BUDGET) -> Variant:
    """The variant with ranks by contribution and the defaults of the study."""
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
    """The exponent for an estimator's scores: those of `fisher` are squares and take half of it."""
    return beta / 2 if estimator == "fisher" else beta
