"""The checkerboard that an adaptation leaves on smooth areas: what does a loss on it take off, and what does it cost?

    python -m examples.experiments.checkerboard.run --data_dir path/to/data

Every cell is finetune.py with its defaults and one value of --checkerboard_weight. Quality is measured on pairs held
out of the training folder; the test folder is not touched. Cells are kept and not run again. `--part 0/2` and `1/2`
share them between two processes. A folder holds cells of one network and one set of settings.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from colora_peft import CoLoRAConfig
from colora_peft.data import PairedImageFolder, PairedPatches, PairSource
from colora_peft.inference import evaluation_mode, reconstruct, tile_multiple
from colora_peft.training import LEARNING_RATES, prepare_for_tuning
from colora_peft.training.loss import centred_cells
from colora_peft.tuner import METHOD_VERSION
from colora_peft.utils import check_at_least, flag, run_script, write_text
from examples.experiments.grid.cells import (
    Cell,
    CellFile,
    FinetuneArguments,
    NetworkArguments,
    PairCentres,
    check_lists,
    load_network,
    measure_contributions,
    network_fingerprint,
    own_accelerator,
    own_part,
    run_arguments,
    split_up_to,
    train_and_validate,
)
from examples.experiments.grid.results import standard_error
from examples.experiments.grid.tuned import CELLS_FILE, REPORT_FILE, check_same_settings, method_settings
from examples.experiments.tables import markdown_table

COUNTS = ("max_train_steps", "resolution", "per_device_train_batch_size", "train_pairs", "validation_pairs")
SMOOTHING = 31
"""Side in pixels of the mean over which inputs are smoothed: almost twice the cell of NAFNet."""


@dataclass(kw_only=True)
class CheckerboardArguments(NetworkArguments):
    """Flags of the comparison."""

    data_dir: str = flag(help="Folder that holds TASK/train with input/ and target/.")
    tasks: list[str] = flag(factory=lambda: ["underwater", "lowlight", "haze"], help="Folders of --data_dir.")
    weights: list[float] = flag(
        factory=lambda: [0.0, FinetuneArguments.checkerboard_weight],
        help="Values of --checkerboard_weight; the lowest is compared to.",
    )
    learning_rates: list[float] = flag(
        factory=lambda: [LEARNING_RATES["colora"]], help="One learning rate, of all runs."
    )
    model_name_or_path: str = flag("examples/checkpoints/nafnet-small-prod", "Folder of the pre-trained network.")
    train_pairs: int = flag(32, "Number of pairs to train on, where there are so many besides those held out.")
    validation_pairs: int = flag(14, "Number of pairs that are held out of the training folder.")
    max_train_steps: int = flag(500, "Number of training steps of each cell.")
    resolution: int = flag(128, "Side of the square training patches in pixels.")
    evaluated_size: int = flag(256, "Side in pixels of the image centres that quality is measured on.")
    parameter_budget: float = flag(0.07, "Trained share of the weights.")
    output_dir: str = flag("outputs/checkerboard", "Folder for cells.json and report.md.")

    def __post_init__(self) -> None:
        check_lists({name: getattr(self, name) for name in ("tasks", "weights", "seeds", "learning_rates")})
        if len(self.learning_rates) > 1:
            raise ValueError(f"--learning_rates takes one here, got {len(self.learning_rates)}: choose one.")
        for name in (*COUNTS, "evaluated_size"):
            check_at_least(self, name, 1)

    def train_dir(self, task: str) -> Path:
        """Folder of the pairs of a task."""
        return Path(self.data_dir) / task / "train"

    def shared_settings(self) -> Cell:
        """Settings that all cells of a folder have in common."""
        network = {"model_sha256": network_fingerprint(self.model_name_or_path), "method_version": METHOD_VERSION}
        names = (*COUNTS, "learning_rates", "evaluated_size", "parameter_budget")
        return {name: getattr(self, name) for name in names} | network | method_settings()


def smoothed(images: Tensor) -> Tensor:
    """Mean over a window around each pixel of images (B, C, H, W), whose edges are repeated outwards."""
    side = SMOOTHING // 2
    return F.avg_pool2d(F.pad(images, (side,) * 4, mode="replicate"), SMOOTHING, stride=1)


@torch.no_grad()
def checkerboard_in_levels(pairs: PairSource, model: nn.Module) -> Cell:
    """Root mean square of the checkerboard on smoothed inputs, in grey levels of 255, mean over the images."""
    device, period, found = next(model.parameters()).device, tile_multiple(model), []
    with evaluation_mode(model):
        for index in range(len(pairs)):
            restored = reconstruct(model, smoothed(pairs[index][0][None].to(device))).float()
            pattern = centred_cells(restored - smoothed(restored), period).mean(2)
            found.append(255 * pattern.square().mean().sqrt().item())
    return {"checkerboard": mean(found)}


def run_cell(args: CheckerboardArguments, settings: Cell, accelerator: Accelerator) -> Cell:
    """Trains once and measures the pairs held out.

    Raises:
        ValueError: The folder has no pairs to train on besides those.
    """
    train_dir, seed = str(args.train_dir(settings["task"])), settings["seed"]
    chosen, validation = split_up_to(train_dir, args.train_pairs, args.validation_pairs, seed, "drawn")
    patches, centres = PairedPatches(chosen, args.resolution, seed), PairCentres(validation, args.evaluated_size)
    set_seed(seed)
    network = load_network(args.model_name_or_path, accelerator)
    with tempfile.TemporaryDirectory() as folder:
        run = replace(
            run_arguments(args, folder, args.learning_rates[0], seed),
            checkerboard_weight=settings["checkerboard_weight"],
        )
        config = CoLoRAConfig(parameter_budget=args.parameter_budget)
        config.contributions = measure_contributions(network, patches, run, accelerator).scores
        set_seed(seed)
        model = prepare_for_tuning(network, "colora", config)
        measure = partial(checkerboard_in_levels, centres)
        return train_and_validate(model, patches, centres, run, accelerator, also=measure)


def report(cells: list[Cell]) -> str:
    """Markdown: quality at each weight minus that at the lowest, and the checkerboard, by task and on the mean."""
    weights = sorted({cell["checkerboard_weight"] for cell in cells})
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    parts = []
    for name, title in (
        ("psnr", f"PSNR in dB, minus that at weight {weights[0]:g}:"),
        ("ssim", f"SSIM, minus that at weight {weights[0]:g}:"),
        ("checkerboard", "Checkerboard on smoothed inputs, root mean square in grey levels of 255:"),
    ):
        found = {(c["task"], c["checkerboard_weight"], c["seed"]): c[name] for c in cells if name in c}
        rows = [report_row(found, name, weight, weights[0], tasks) for weight in weights]
        parts.append(f"{title}\n\n{markdown_table(['weight', *tasks, 'mean'], rows)}")
    failed = [
        f"Failed: {cell['task']}, weight {cell['checkerboard_weight']:g}, seed {cell['seed']}: {cell[fault]}"
        for cell in cells
        for fault in ("failed", "also_failed")
        if fault in cell
    ]
    first = cells[0]
    return (
        f"CoLoRA, {first['max_train_steps']} steps of {first['per_device_train_batch_size']} x {first['resolution']}, "
        f"up to {first['train_pairs']} pairs, {first['validation_pairs']} others held out of the training folder. "
        "Errors are those of the mean over the tasks.\n\n" + "\n\n".join([*parts, *failed]) + "\n"
    )


def report_row(
    found: dict[tuple[str, float, int], float], name: str, weight: float, base: float, tasks: list[str]
) -> list[str]:
    """A line of the report: means over the seeds by task, and the mean over the tasks, if there are all."""
    is_difference, digits = name != "checkerboard", 3 if name == "ssim" else 2
    means = {}
    for task in tasks:
        seeds = [seed for (t, w, seed) in found if (t, w) == (task, weight) and (task, base, seed) in found]
        if seeds:
            reference = mean(found[task, base, seed] for seed in seeds) if is_difference else 0.0
            means[task] = mean(found[task, weight, seed] for seed in seeds) - reference
    number = f"{'+' if is_difference else ''}.{digits}f"
    mean_text = ""
    if len(means) == len(tasks):
        mean_text = format(mean(means.values()), number)
        if is_difference and weight != base and len(tasks) > 1:
            mean_text += f" ± {standard_error(list(means.values())):.{digits}f}"
    return [f"{weight:g}", *(format(means[task], number) if task in means else "" for task in tasks), mean_text]


def main(args: CheckerboardArguments) -> None:
    accelerator = own_accelerator()
    check_same_settings(args.output_dir, args.shared_settings())
    data = {task: PairedImageFolder(args.train_dir(task)).digest for task in args.tasks}
    file = CellFile(Path(args.output_dir) / CELLS_FILE)
    shared = {name: getattr(args, name) for name in COUNTS}
    for seed, task, weight in own_part(list(product(args.seeds, args.tasks, args.weights)), args.part):
        settings = {"task": task, "data": data[task], "checkerboard_weight": weight, "seed": seed, **shared}
        if file.find(settings) is None:
            file.add({**settings, **run_cell(args, settings, accelerator)})
            print(f"{task}, weight {weight:g}, seed {seed}: done", flush=True)
    text = report(CellFile(file.path).cells)
    write_text(file.path.with_name(REPORT_FILE), text)
    print(f"\n{text}")


if __name__ == "__main__":
    run_script(main, CheckerboardArguments)
