"""The plan of benchmark.py: its flags, what it compares, and in which order."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from finetune import FinetuneArguments
from grid_cells import RESULTS, Cell

from colora_peft.evaluation import SSIM_WINDOW_PX
from colora_peft.training import METHODS
from colora_peft.utils import check_at_least

NONE = "none"
"""A network: new weights instead of pre-trained ones."""
PEFT_LORA = "peft_lora"
"""A method: LoRA as PEFT itself has it, in the layers that it takes; "lora" is ours, in all."""
BUDGETED = ("lora", PEFT_LORA, "colora")
BUDGET = 0.07
COMPARISONS = ("pretraining", "tuning")

# Length and size of each run: 25 s on one core, and for one large GPU (not run there yet). With all tasks, methods and
# rates the default plan has 360 runs: choose with --tasks, --methods and --budgets, the rest can be added later.
PRESETS: dict[str, dict[str, object]] = {
    "cpu": {"max_train_steps": 200, "resolution": 64, "per_device_train_batch_size": 4, "evaluated_size": 256},
    "gpu": {"max_train_steps": 1000, "resolution": 128, "per_device_train_batch_size": 8, "evaluated_size": 2048},
}


@dataclass
class BenchmarkArguments:
    """Flags of the benchmark."""

    data_dir: str = field(
        default="data", metadata={"help": "Folder that holds TASK/train and TASK/test, each with input/ and target/."}
    )
    tasks: list[str] = field(
        default_factory=lambda: ["underwater", "noise", "rain", "reflection", "blur"], metadata={"help": "Of them."}
    )
    networks: list[str] = field(
        default_factory=lambda: [f"prod={FinetuneArguments.model_name_or_path}"],
        metadata={"help": "NAME=FOLDER_OR_ID of pre-trained networks; the first is the one that is tuned in all ways. "
                  f"NAME alone, {NONE}: new weights of the first one's shape."},
    )  # fmt: skip
    comparisons: list[str] = field(
        default_factory=lambda: list(COMPARISONS),
        metadata={"help": "pretraining: each network, tuned in full; tuning: the first network in all ways."},
    )
    preset: Literal["cpu", "gpu"] = field(
        default="cpu", metadata={"help": f"Length and size of the runs: {PRESETS}. Flags of your own override it."}
    )
    train_pairs: list[int] = field(default_factory=lambda: [16], metadata={"help": "Numbers of pairs to train on."})
    methods: list[str] = field(
        default_factory=lambda: ["full", "decoder", "bias", *BUDGETED], metadata={"help": "For `tuning`."}
    )
    budgets: list[float] = field(
        default_factory=lambda: [BUDGET, 0.02],
        metadata={"help": f"Of {', '.join(BUDGETED)}; rates are chosen at each."},
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [5e-4, 1e-3, 2e-3, 4e-3, 8e-3], metadata={"help": "Tried with the tuning seed."}
    )
    tuned_at: int = field(default=16, metadata={"help": "Number of pairs that rates are chosen at, for all numbers."})
    tuning_seed: int = field(default=100, metadata={"help": "Of pairs and patches to try rates with."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of pairs, patches and adapters."})
    validation_pairs: int = field(default=18, metadata={"help": "Other pairs of TASK/train, for the rates."})
    max_train_steps: int | None = field(default=None, metadata={"help": "Steps of each cell."})
    resolution: int | None = field(default=None, metadata={"help": "Side of the patches."})
    per_device_train_batch_size: int | None = field(default=None, metadata={"help": "Patches a step."})
    evaluated_size: int | None = field(
        default=None, metadata={"help": "Side of the centres that PSNR and SSIM are measured on."}
    )
    part: str = field(default="0/1", metadata={"help": "Run this part of the plan only, as in 0/2 and 1/2."})
    retry_failed: bool = field(default=False, metadata={"help": "Run the cells that failed once more."})
    report_only: bool = field(default=False, metadata={"help": "Run nothing, write the report of what is there."})
    output_dir: str = field(default=str(RESULTS / "benchmark"), metadata={"help": "For cells and report."})

    def __post_init__(self) -> None:
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name in ("tasks", "networks", "comparisons", "train_pairs", "budgets", "learning_rates", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"--{name} must list at least one value and none twice, got {values}.")
        for name, known in (("comparisons", COMPARISONS), ("methods", (*METHODS, PEFT_LORA))):
            for value in getattr(self, name):
                if value not in known:
                    raise ValueError(f"--{name} has {value!r}: choose of {', '.join(known)}.")
        for budget in self.budgets:
            if not 0 < budget <= 1:
                raise ValueError(f"--budgets has {budget:g}, which is no share of the weights: above 0, at most 1.")
        for name in ("validation_pairs", "max_train_steps", "resolution", "per_device_train_batch_size", "tuned_at"):
            check_at_least(self, name, 1)
        check_at_least(self, "evaluated_size", SSIM_WINDOW_PX)
        if self.tuning_seed in self.seeds:
            raise ValueError(f"--tuning_seed {self.tuning_seed} is one of --seeds: choose another.")
        self.network_paths()
        if not self.report_only:
            self.check_folders()

    def check_folders(self) -> None:
        """Raises: FileNotFoundError, if a task lacks its training or its test folder."""
        for task in self.tasks:
            for split in ("train", "test"):
                folder = Path(self.data_dir) / task / split
                if not folder.is_dir():
                    raise FileNotFoundError(f"There is no folder {folder}; add it, or leave the task out of --tasks.")

    def network_paths(self) -> dict[str, str]:
        """Path of each network by its name; that of NONE is the first one's, whose shape it takes."""
        paths: dict[str, str] = {}
        for text in self.networks:
            name, _, path = text.partition("=")
            if not (path or (name == NONE and paths)) or name in paths:
                raise ValueError(f"--networks has {text!r}: write NAME=FOLDER, each name once, and {NONE} not first.")
            paths[name] = path or next(iter(paths.values()))
        return paths

    def train_dir(self, task: str) -> str:
        return str(Path(self.data_dir) / task / "train")


class Variant(NamedTuple):
    """What is compared, on one task."""

    task: str
    train_pairs: int
    network: str
    method: str
    """As in `colora_peft.training.methods`."""
    parameter_budget: float | None = None

    def settings(self) -> Cell:
        return {name: value for name, value in self._asdict().items() if value is not None}

    def tuned_as(self, args: BenchmarkArguments) -> Variant:
        """The variant whose learning rate this one takes."""
        return self._replace(train_pairs=args.tuned_at)


def plan(args: BenchmarkArguments) -> list[Variant]:
    """All variants in the order in which they are run: what answers most comes first."""
    variants = []
    for pairs in args.train_pairs:
        for comparison in args.comparisons:
            for task in args.tasks:
                variants += variants_of(comparison, task, pairs, args)
    return list(dict.fromkeys(variants))


def variants_of(comparison: str, task: str, pairs: int, args: BenchmarkArguments) -> list[Variant]:
    networks = list(args.network_paths())
    if comparison == "pretraining":
        return [Variant(task, pairs, network, "full") for network in networks]
    budgets = {method: args.budgets if method in BUDGETED else [None] for method in args.methods}
    return [Variant(task, pairs, networks[0], method, budget) for method in args.methods for budget in budgets[method]]
