"""Ways to begin an adaptation, beside PEFT's LoRA: does any of them restore better?

    python -m examples.experiments.start.run --data_dir path/to/data --model_name_or_path path/to/network

Every way runs at every learning rate, on the same pairs and patches. Quality is measured on pairs held out of the
training folder; the test folder is not touched. Cells are kept and not run again. `--part 0/2` and `1/2` share them
between two processes. A folder holds cells of one network and one set of settings.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from itertools import product
from math import nan
from pathlib import Path
from typing import get_args

from accelerate import Accelerator
from accelerate.utils import set_seed

from colora_peft.data import PairedImageFolder, PairedPatches, collate
from colora_peft.training import DataFailed
from colora_peft.tuner import METHOD_VERSION
from colora_peft.utils import check_at_least, flag, run_script, write_text
from examples.experiments.grid.cells import (
    Cell,
    CellFile,
    NetworkArguments,
    PairCentres,
    Validation,
    check_lists,
    load_network,
    network_fingerprint,
    own_accelerator,
    own_part,
    run_arguments,
    split_up_to,
    train_and_validate,
)
from examples.experiments.grid.tuned import CELLS_FILE, REPORT_FILE, check_same_settings, method_settings
from examples.experiments.start.report import report
from examples.experiments.start.ways import WAYS, begin

VALIDATIONS = get_args(Validation)
COUNTS = ("max_train_steps", "resolution", "per_device_train_batch_size", "train_pairs", "validation_pairs")


@dataclass(kw_only=True)
class StartArguments(NetworkArguments):
    """Flags of the comparison."""

    data_dir: str = flag(help="Folder that holds TASK/train with input/ and target/.")
    tasks: list[str] = flag(
        factory=lambda: ["underwater", "noise", "rain", "lowlight", "shadow", "haze_real"],
        help="Names of the tasks, folders of --data_dir.",
    )
    ways: list[str] = flag(factory=lambda: list(WAYS), help=f"Ways to begin: {', '.join(WAYS)}.")
    learning_rates: list[float] = flag(factory=lambda: [3e-3, 6e-3], help="Learning rates to run each way with.")
    train_pairs: int = flag(32, "Number of pairs to train on, where there are so many besides those held out.")
    validation_pairs: int = flag(14, "Number of pairs that are held out of the training folder.")
    validation: str = flag(
        "drawn",
        "Which pairs are held out: drawn, from the places trained on; or block, neighbours by name, from others.",
    )
    max_train_steps: int = flag(300, "Number of training steps of each cell.")
    evaluated_size: int = flag(256, "Side in pixels of the image centres that quality is measured on.")
    parameter_budget: float = flag(0.07, "Trained share of the weights.")
    gradient_batches: int = flag(8, "Number of batches that the gradient is the mean of.")
    output_dir: str = flag("outputs/start", "Folder for cells.json and report.md.")

    def __post_init__(self) -> None:
        check_lists({name: getattr(self, name) for name in ("tasks", "ways", "learning_rates", "seeds")})
        unknown = [name for name in self.ways if name not in WAYS]
        if unknown:
            raise ValueError(f"There is no way {unknown[0]!r}; choose of {', '.join(WAYS)}.")
        if self.validation not in VALIDATIONS:
            raise ValueError(f"--validation is {self.validation!r}: choose of {', '.join(VALIDATIONS)}.")
        for name in (*COUNTS, "evaluated_size", "gradient_batches"):
            check_at_least(self, name, 1)
        if not 0 < self.parameter_budget <= 1:
            raise ValueError(f"--parameter_budget is {self.parameter_budget:g}: choose a share above 0, at most 1.")

    def train_dir(self, task: str) -> Path:
        """Folder of the pairs of a task."""
        return Path(self.data_dir) / task / "train"

    def shared_settings(self) -> Cell:
        """Settings that all cells of a folder have in common."""
        names = (*COUNTS, "validation", "evaluated_size", "gradient_batches", "parameter_budget")
        network = {"model_sha256": network_fingerprint(self.model_name_or_path), "method_version": METHOD_VERSION}
        return {**{name: getattr(self, name) for name in names}, **network, **method_settings()}


def run_cell(args: StartArguments, settings: Cell, accelerator: Accelerator) -> Cell:
    """Trains once and returns PSNR on the pairs held out.

    Raises:
        ValueError: The folder has no pairs to train on besides those.
    """
    train_dir, seed = str(args.train_dir(settings["task"])), settings["seed"]
    chosen, validation = split_up_to(train_dir, args.train_pairs, args.validation_pairs, seed, args.validation)
    patches, size = PairedPatches(chosen, args.resolution, seed), args.per_device_train_batch_size
    samples = [[patches[number * size + i] for i in range(size)] for number in range(args.gradient_batches)]
    batches = [
        {name: batch[name].to(accelerator.device) for name in ("pixel_values", "labels")}
        for batch in map(collate, samples)
    ]
    set_seed(seed)
    network = load_network(args.model_name_or_path, accelerator)
    model = begin(network, settings["way"], batches, args.parameter_budget)
    with tempfile.TemporaryDirectory() as folder:
        run = run_arguments(args, folder, settings["learning_rate"], seed)
        return train_and_validate(model, patches, PairCentres(validation, args.evaluated_size), run, accelerator)


def main(args: StartArguments) -> None:
    accelerator = own_accelerator()
    check_same_settings(args.output_dir, args.shared_settings())
    shared = {name: getattr(args, name) for name in (*COUNTS, "parameter_budget")}
    data = {task: PairedImageFolder(args.train_dir(task)).digest for task in args.tasks}
    file = CellFile(Path(args.output_dir) / CELLS_FILE)
    grid = list(product(args.seeds, args.tasks, args.ways, args.learning_rates))
    for seed, task, way, rate in own_part(grid, args.part):
        settings = {"task": task, "data": data[task], "way": way, "learning_rate": rate, "seed": seed, **shared}
        if file.find(settings) is None:
            try:
                cell = {**settings, **run_cell(args, settings, accelerator)}
            except DataFailed:  # says nothing about the way
                raise
            except ValueError as error:  # a budget below rank 1: the others still run
                cell = {**settings, "failed": str(error)}
            file.add(cell)
            print(f"{task}, {way}, {rate:g}, seed {seed}: {cell.get('psnr', nan):.2f} dB", flush=True)
    text = report(CellFile(file.path).cells)
    write_text(file.path.with_name(REPORT_FILE), text)
    print(f"\n{text}")


if __name__ == "__main__":
    run_script(main, StartArguments, DataFailed)
