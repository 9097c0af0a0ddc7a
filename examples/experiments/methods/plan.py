"""The plan of the comparison: its flags, its variants, and their order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from colora_peft.training import LEARNING_RATES, METHODS
from colora_peft.utils import check_at_least, flag
from examples.experiments.grid.cells import Cell, check_lists, check_network
from examples.experiments.grid.tuned import TunedArguments
from examples.finetune import SHIPPED_NETWORK, FinetuneArguments

NONE = "none"
"""Name of the network with new weights instead of pre-trained ones."""
PEFT_LORA = "peft_lora"
"""The method that is PEFT's own LoRA, in the layers that it takes; "lora" is ours, in all."""
COLORA_DEFAULT = "colora_default"
"""The method that is CoLoRA with the learning rate and the loss that finetune.py has without a flag."""
COLORA_PLAIN = "colora_plain"
"""The method that is CoLoRA at that learning rate, on the mean absolute error alone."""
FULL_CHECKERBOARD, PEFT_LORA_CHECKERBOARD = "full_checkerboard", "peft_lora_checkerboard"
"""The methods that are full tuning and PEFT's LoRA with the loss of finetune.py, at the rate chosen without it."""


class Way(NamedTuple):
    """How a method of the comparison trains."""

    trains: str
    """One of `colora_peft.training.METHODS`, or PEFT_LORA."""
    is_tuned: bool = True
    """Whether its learning rate is chosen; otherwise it is the one that finetune.py has without a flag."""
    has_checkerboard_loss: bool = False
    """Whether its loss is the one that finetune.py has without a flag; otherwise the mean absolute error alone."""


WAYS = {name: Way(name) for name in (*METHODS, PEFT_LORA)} | {
    COLORA_DEFAULT: Way("colora", is_tuned=False, has_checkerboard_loss=True),
    COLORA_PLAIN: Way("colora", is_tuned=False),
    FULL_CHECKERBOARD: Way("full", has_checkerboard_loss=True),
    PEFT_LORA_CHECKERBOARD: Way(PEFT_LORA, has_checkerboard_loss=True),
}
"""The methods of the comparison by name."""
BUDGETED = tuple(name for name, way in WAYS.items() if way.trains in ("lora", PEFT_LORA, "colora"))
BUDGET = 0.07
COMPARISONS = ("pretraining", "tuning")


@dataclass(kw_only=True)
class BenchmarkArguments(TunedArguments):
    """Flags of the comparison."""

    data_dir: str = flag("data", "Folder that holds TASK/train and TASK/test, each with input/ and target/.")
    tasks: list[str] = flag(
        factory=lambda: ["underwater", "noise", "rain", "reflection", "blur"],
        help="Names of the tasks to run, folders of --data_dir.",
    )
    networks: list[str] = flag(
        factory=lambda: [f"prod={SHIPPED_NETWORK}"],
        help="NAME=FOLDER_OR_ID of pre-trained networks; the first is the one that is tuned in all ways. "
        f"{NONE} alone: new weights of the first one's shape.",
    )
    comparisons: list[str] = flag(
        factory=lambda: list(COMPARISONS),
        help="pretraining: each network, tuned in full; tuning: the first network in all ways.",
    )
    train_pairs: list[int] = flag(factory=lambda: [16], help="Numbers of pairs to train on.")
    methods: list[str] = flag(
        factory=lambda: ["full", "decoder", "bias", "lora", PEFT_LORA, "colora", COLORA_DEFAULT],
        help="Methods of the comparison `tuning`.",
    )
    budgets: list[float] = flag(
        factory=lambda: [BUDGET, 0.02],
        help=f"Trained shares of the weights ({', '.join(BUDGETED)}); rates are chosen at each.",
    )
    full_learning_rates: list[float] | None = flag(
        None, "Learning rates to try for full tuning, whose best rate is lower. Default: --learning_rates."
    )
    tuned_at: int = flag(16, "Number of pairs that learning rates are chosen at, for all numbers of pairs.")
    retry_failed: bool = flag(False, "Run the cells that failed once more.")
    report_only: bool = flag(False, "Run nothing, write the report of the cells.")
    output_dir: str = flag("outputs/methods", "Folder for cells and report.")

    def __post_init__(self) -> None:
        names = ("tasks", "networks", "comparisons", "train_pairs", "budgets", "learning_rates", "seeds")
        check_lists({name: getattr(self, name) for name in names})
        if self.full_learning_rates is not None:
            check_lists({"full_learning_rates": self.full_learning_rates})
        for name, known in (("comparisons", COMPARISONS), ("methods", tuple(WAYS))):
            for value in getattr(self, name):
                if value not in known:
                    raise ValueError(f"--{name} has {value!r}: choose of {', '.join(known)}.")
        for budget in self.budgets:
            if not 0 < budget <= 1:
                raise ValueError(f"--budgets has {budget:g}, which is no share of the weights: above 0, at most 1.")
        for name in ("validation_pairs", "max_train_steps", "resolution", "per_device_train_batch_size", "tuned_at"):
            check_at_least(self, name, 1)
        super().__post_init__()
        paths = self.network_paths()
        if not self.report_only:
            for path in paths.values():
                check_network(path)

    def network_paths(self) -> dict[str, str]:
        """Path of each network by its name; NONE has the path of the first, whose shape it takes."""
        paths: dict[str, str] = {}
        for text in self.networks:
            name, _, path = text.partition("=")
            if not (path or (name == NONE and paths)) or name in paths:
                raise ValueError(f"--networks has {text!r}: write NAME=FOLDER, each name once, and {NONE} not first.")
            paths[name] = path or next(iter(paths.values()))
        return paths

    def train_dir(self, task: str) -> str:
        """Training folder of a task."""
        return str(Path(self.data_dir) / task / "train")


class Variant(NamedTuple):
    """A way to tune, on one task."""

    task: str
    train_pairs: int
    network: str
    method: str
    """A name in WAYS."""
    parameter_budget: float | None = None

    @property
    def trains(self) -> str:
        """One of `colora_peft.training.METHODS`, or PEFT_LORA."""
        return WAYS[self.method].trains

    @property
    def fixed_rate(self) -> float | None:
        """The learning rate that nobody tunes; None if it is tuned."""
        return None if WAYS[self.method].is_tuned else LEARNING_RATES[self.trains]

    @property
    def checkerboard_weight(self) -> float:
        """Weight of the loss on checkerboards."""
        return FinetuneArguments.checkerboard_weight if WAYS[self.method].has_checkerboard_loss else 0.0

    def own_rates(self, args: BenchmarkArguments) -> list[float] | None:
        """The learning rates to try, if they are not --learning_rates."""
        return args.full_learning_rates if self.trains == "full" else None

    def tuned_as(self, args: BenchmarkArguments) -> Variant:
        """The variant whose learning rate this one takes: on --tuned_at pairs, on the mean absolute error alone."""
        return self._replace(train_pairs=args.tuned_at, method=self.trains if self.fixed_rate is None else self.method)


def plan(args: BenchmarkArguments) -> list[Variant]:
    """All variants in the order in which they run: those that answer most come first."""
    variants = []
    for pairs in args.train_pairs:
        for comparison in args.comparisons:
            for task in args.tasks:
                variants += variants_of(comparison, task, pairs, args)
    return list(dict.fromkeys(variants))


def variants_of(comparison: str, task: str, pairs: int, args: BenchmarkArguments) -> list[Variant]:
    """Variants of one comparison on one task and number of pairs."""
    networks = list(args.network_paths())
    if comparison == "pretraining":
        return [Variant(task, pairs, network, "full") for network in networks]
    budgets = {method: args.budgets if method in BUDGETED else [None] for method in args.methods}
    return [Variant(task, pairs, networks[0], method, budget) for method in args.methods for budget in budgets[method]]


def label(network: str, method: str, budget: float | None) -> str:
    """A way to tune as the paper writes it."""
    return f"{network} + {method}{f' {budget:.3g}' if budget is not None else ''}"


def label_of(cell: Cell) -> str:
    """The way to tune that a cell was run with."""
    return label(cell["network"], cell["method"], cell.get("parameter_budget"))
