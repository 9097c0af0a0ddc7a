"""Does a DoRA-style magnitude help CoLoRA? Measured on training pairs only; it is not part of the product.

    python examples/compare_magnitude.py --train_dirs path/to/underwater/train path/to/noise/train

DoRA (Liu et al., ICML 2024, arXiv 2402.09353) trains the length of each row of a weight apart from its direction. The
delta of CoLoRA lives on the weight, so a subclass of its layer is all that takes (magnitude_layer.py). Both variants
of one task and seed share pairs, patches, contribution scores and initial adapters. The magnitudes come on top of the
budget that both share; the table counts them.

Cells are kept in one JSON file and not run again; each call ends by printing the tables of the grid it was asked for.
An interrupted grid measures the scores of a task and seed again: the same ones on one CPU set-up.
"""

from __future__ import annotations

import math
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from accelerate import Accelerator
from accelerate.utils import set_seed
from finetune import FinetuneArguments
from grid_cells import RESULTS, Cell, CellFile, load_network, split_pairs, task_name, train_and_validate
from magnitude_layer import add_magnitudes
from peft import PeftModel
from restoration_task import measure_contributions
from search_learning_rates import SearchArguments, cell_settings
from transformers import HfArgumentParser

from colora_peft.data import PairedImageFolder, PairedPatches, PairSource, check_pairs
from colora_peft.training import DataFailed, prepare_for_tuning, use_all_cores
from colora_peft.utils import write_text

PLAIN, MAGNITUDE = VARIANTS = ("plain", "magnitude")
HELPFUL_DB = 0.1
"""A smaller gain would not be worth one more kind of parameter."""
HELPFUL_STANDARD_ERRORS = 2.0

Grid = dict[tuple[str, str, float, int], Cell]
"""Cells by task, variant, learning rate and seed."""


@dataclass
class MagnitudeArguments:
    """Flags of the comparison."""

    train_dirs: list[str] = field(metadata={"help": "One folder TASK/train with input/ and target/ for each task."})
    learning_rates: list[float] = field(
        default_factory=lambda: [3e-3, 1e-2], metadata={"help": "Learning rates; each variant counts at its best."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of pairs, patches and adapters."})
    max_train_steps: int = field(default=300, metadata={"help": "Steps of each cell."})
    resolution: int = field(default=FinetuneArguments.resolution, metadata={"help": "Side of the patches."})
    per_device_train_batch_size: int = field(
        default=FinetuneArguments.per_device_train_batch_size, metadata={"help": "Patches a step."}
    )
    probe_steps: int = field(
        default=FinetuneArguments.probe_steps, metadata={"help": "Steps of the tuning that measures contributions."}
    )
    train_pairs: int = field(default=16, metadata={"help": "Pairs to train on, drawn by the seed."})
    validation_pairs: int = field(default=18, metadata={"help": "Other pairs of the folder to validate on."})
    results: str = field(default=str(RESULTS / "magnitude.json"), metadata={"help": "File of the cells."})

    def __post_init__(self) -> None:
        lists = {"train_dirs": self.tasks(), "learning_rates": self.learning_rates, "seeds": self.seeds}
        for name, values in lists.items():
            if not values or len(set(values)) < len(values):
                raise ValueError(f"--{name} must list at least one value and none twice, got {values}.")
        for name in ("train_pairs", "validation_pairs"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        for learning_rate, seed in product(self.learning_rates, self.seeds):
            self.of_run("", learning_rate, seed)  # refuses wrong values before the first cell

    def tasks(self) -> list[str]:
        """Their names: of the folders above `train`."""
        return [task_name(folder) for folder in self.train_dirs]

    def of_task(self, train_dir: str) -> SearchArguments:
        """The same task as search_learning_rates.py describes and splits it."""
        return SearchArguments(train_dir=train_dir, **self._shared(), **self._pair_counts())

    def of_run(self, output_dir: str, learning_rate: float, seed: int) -> FinetuneArguments:
        return FinetuneArguments(
            output_dir=output_dir,
            learning_rate=learning_rate,
            seed=seed,
            probe_steps=self.probe_steps,
            checkpointing_steps=self.max_train_steps,
            **self._shared(),
        )

    def _shared(self) -> dict[str, int]:
        names = ("max_train_steps", "resolution", "per_device_train_batch_size")
        return {name: getattr(self, name) for name in names}

    def _pair_counts(self) -> dict[str, int]:
        return {"train_pairs": self.train_pairs, "validation_pairs": self.validation_pairs}

    def settings(self, train_dir: str, variant: str, learning_rate: float, seed: int) -> Cell:
        """Everything that decides the outcome of a cell; two cells with equal settings are the same cell."""
        shared = cell_settings(self.of_task(train_dir), "colora", learning_rate, seed)
        return {**shared, "probe_steps": self.probe_steps, "variant": variant}


# ------------------------------------------------------------------------------------------------------------ cells


class Draw(NamedTuple):
    """What all cells of one task and seed share."""

    task: SearchArguments
    seed: int
    patches: PairedPatches
    validation: PairSource
    scores: dict[str, float]


def draw(args: MagnitudeArguments, train_dir: str, seed: int, accelerator: Accelerator) -> Draw:
    """Split the pairs of a task by the seed and measure the contributions on those to train on."""
    set_seed(seed)
    task = args.of_task(train_dir)
    chosen, validation = split_pairs(train_dir, args.train_pairs, args.validation_pairs, seed)
    patches = PairedPatches(chosen, args.resolution, seed)
    run = args.of_run("", args.learning_rates[0], seed)
    scores = measure_contributions(load_network(accelerator), patches, run, accelerator).scores
    return Draw(task, seed, patches, validation, scores)


def adapted_network(drawn: Draw, variant: str, accelerator: Accelerator) -> PeftModel:
    """The network as training starts: both variants have the same ranks and the same initial factors."""
    run = FinetuneArguments(parameter_budget=drawn.task.parameter_budget, beta=drawn.task.beta)
    network = load_network(accelerator)
    set_seed(drawn.seed)  # directly before the adapters are drawn
    model = prepare_for_tuning(network, "colora", run.adapter_config(drawn.scores))
    return add_magnitudes(model) if variant == MAGNITUDE else model


def run_cell(settings: Cell, args: MagnitudeArguments, drawn: Draw, accelerator: Accelerator) -> Cell:
    """Train and validate once."""
    model = adapted_network(drawn, settings["variant"], accelerator)
    with tempfile.TemporaryDirectory() as folder:
        run = args.of_run(folder, settings["learning_rate"], drawn.seed)
        return {**settings, **train_and_validate(model, drawn.patches, drawn.validation, run, accelerator)}


def run_grid(args: MagnitudeArguments, accelerator: Accelerator) -> Grid:
    """Run the cells that the results file lacks, saving after each; all cells of the grid."""
    file = CellFile(args.results)
    grid: Grid = {}
    for seed, (train_dir, task) in product(args.seeds, zip(args.train_dirs, args.tasks(), strict=True)):
        drawn = None
        for variant, rate in product(VARIANTS, args.learning_rates):
            settings = args.settings(train_dir, variant, rate, seed)
            cell = file.find(settings)
            if cell is None:
                print(settings)
                drawn = drawn or draw(args, train_dir, seed, accelerator)
                cell = run_cell(settings, args, drawn, accelerator)
                file.add(cell)
                print(f"-> {cell.get('psnr', math.nan):.2f} dB", flush=True)
            grid[task, variant, rate, seed] = cell
    return grid


# ----------------------------------------------------------------------------------------------------------- report


class Comparison(NamedTuple):
    """Of the variants, each at the learning rate that is best for it in the mean over the seeds (NaN: none)."""

    rates: dict[str, float]
    differences: list[float]
    """Validation PSNR (dB) with the magnitude less that without, of each seed."""

    @property
    def difference(self) -> float:
        return mean(self.differences)

    @property
    def standard_error(self) -> float:
        """Of the mean over the seeds; NaN for a single one, and where the difference is (`stdev` refuses NaN)."""
        count = len(self.differences)
        if count < 2 or math.isnan(self.difference):
            return math.nan
        return stdev(self.differences) / math.sqrt(count)


def mean_psnr(grid: Grid, args: MagnitudeArguments, task: str, variant: str, rate: float) -> float:
    """Over the seeds, in dB; NaN if a run diverged."""
    return mean(grid[task, variant, rate, seed].get("psnr", math.nan) for seed in args.seeds)


def compare(grid: Grid, args: MagnitudeArguments, task: str) -> Comparison:
    rates = {}
    for variant in VARIANTS:
        means = {rate: mean_psnr(grid, args, task, variant, rate) for rate in args.learning_rates}
        finite = {rate: value for rate, value in means.items() if not math.isnan(value)}
        rates[variant] = max(finite, key=finite.__getitem__, default=math.nan)
    if any(math.isnan(rate) for rate in rates.values()):
        return Comparison(rates, [math.nan] * len(args.seeds))
    plain, magnitude = (
        [grid[task, variant, rates[variant], seed]["psnr"] for seed in args.seeds] for variant in VARIANTS
    )
    return Comparison(rates, [after - before for before, after in zip(plain, magnitude, strict=True)])


def verdict(comparisons: dict[str, Comparison]) -> str:
    """One sentence: the mean over the tasks against its standard error, the tasks' errors being independent."""
    difference = mean(comparison.difference for comparison in comparisons.values())
    error = math.hypot(*(comparison.standard_error for comparison in comparisons.values())) / len(comparisons)
    if math.isnan(difference) or math.isnan(error):
        return "No verdict: that takes two seeds and, for each variant and task, a learning rate that never diverged."
    helps = difference > HELPFUL_DB and difference > HELPFUL_STANDARD_ERRORS * error
    return (
        f"A DoRA-style magnitude {'helps' if helps else 'does not measurably help'}: the mean paired difference on "
        f"{', '.join(comparisons)} is {difference:+.2f} dB with a standard error of {error:.2f} dB (to help, it must "
        f"exceed {HELPFUL_DB:g} dB and {HELPFUL_STANDARD_ERRORS:g} standard errors)."
    )


def quality_table(grid: Grid, args: MagnitudeArguments, comparisons: dict[str, Comparison]) -> str:
    """Markdown: one row per task and variant; `input` and parameters are means over its runs."""
    rates = args.learning_rates
    header = ["task", "variant", "input", *(f"dB at {rate:g}" for rate in rates), "trained parameters"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for task, variant in product(comparisons, VARIANTS):
        cells = [grid[task, variant, rate, seed] for rate, seed in product(rates, args.seeds)]
        done = [cell for cell in cells if "psnr" in cell]
        shown = []
        for rate in rates:
            value = mean_psnr(grid, args, task, variant, rate)
            text = "diverged" if math.isnan(value) else f"{value:.2f}"
            shown.append(f"**{text}**" if rate == comparisons[task].rates[variant] else text)
        inputs = mean(cell["psnr_input"] for cell in done) if done else math.nan
        parameters = mean(cell["trainable_parameters"] for cell in cells)
        columns = [task, variant, f"{inputs:.2f}", *shown, f"{parameters:,.0f}"]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def difference_table(comparisons: dict[str, Comparison]) -> str:
    """Markdown: one row per task, magnitude less plain."""
    lines = ["| task | difference (dB) | standard error | of each seed |", "|---|---|---|---|"]
    for task, comparison in comparisons.items():
        seeds = ", ".join(f"{difference:+.2f}" for difference in comparison.differences)
        lines.append(f"| {task} | {comparison.difference:+.2f} | {comparison.standard_error:.2f} | {seeds} |")
    return "\n".join(lines)


def report(grid: Grid, args: MagnitudeArguments) -> str:
    comparisons = {task: compare(grid, args, task) for task in args.tasks()}
    return (
        f"{verdict(comparisons)}\n\n"
        f"Mean validation PSNR over the seeds {', '.join(map(str, args.seeds))}, by learning rate; the best of each "
        f"row in bold. {args.train_pairs} training pairs, {args.validation_pairs} others of the training folder to "
        f"validate on, {args.max_train_steps} steps of {args.per_device_train_batch_size} x {args.resolution}.\n\n"
        f"{quality_table(grid, args, comparisons)}\n\n"
        "Magnitude less plain, paired by seed, each at its best learning rate, which is chosen on the same validation "
        f"pairs:\n\n{difference_table(comparisons)}\n"
    )


def check_tasks(args: MagnitudeArguments) -> None:
    """Read everything once, before the first cell; raises ValueError or FileNotFoundError as the sources do."""
    for train_dir in args.train_dirs:
        split_pairs(train_dir, args.train_pairs, args.validation_pairs, args.seeds[0])  # any seed: sizes are equal
        reason = "the training patch: lower --resolution or remove the pair"
        check_pairs(PairedImageFolder(train_dir), args.resolution, reason)


def main(args: MagnitudeArguments) -> None:
    accelerator = Accelerator()
    use_all_cores(accelerator)
    check_tasks(args)
    text = report(run_grid(args, accelerator), args)
    write_text(Path(args.results).with_suffix(".md"), text)
    print(f"\n{text}")


if __name__ == "__main__":
    try:
        (parsed,) = HfArgumentParser(MagnitudeArguments).parse_args_into_dataclasses()
        print(f"{asdict(parsed)}\n")
        main(parsed)
    except (ValueError, FileNotFoundError, DataFailed) as error:
        sys.exit(f"compare_magnitude.py: {error}")
