"""Cells of a grid: fine-tunings, each measured on other pairs, run once and kept."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from filelock import FileLock
from torch import nn

from colora_peft.data import Pair, PairedImageFolder, PairedPatches, PairSource, PairSubset, draw_pairs
from colora_peft.evaluation import evaluate
from colora_peft.hub import hardware_name
from colora_peft.training import TrainingDiverged, train, trained_parameters, use_all_cores
from colora_peft.training import load_network as load_network_of
from colora_peft.training import measure_contributions as measure_contributions
from colora_peft.utils import digest_of_bytes, flag, relative_path, write_json
from examples.finetune import FinetuneArguments as FinetuneArguments

NETWORKS = Path(__file__).parents[1] / "networks"
"""Cards of the networks that only experiments read. They are made, not shipped."""
NETWORK = "outputs/nafnet-small-prod-v1"
"""The network that the studies of the method start from: an earlier one than the shipped, as their cells have it."""

Cell = dict[str, Any]
"""Settings of a run and its outcome, as JSON keeps them."""

T = TypeVar("T")


# ------------------------------------------------------------------------------------------------------------ flags


@dataclass(kw_only=True)
class GridArguments:
    """Flags that all grids share."""

    learning_rates: list[float] = flag(factory=lambda: [5e-4, 1e-3, 2e-3, 4e-3, 8e-3], help="Learning rates to try.")
    seeds: list[int] = flag(factory=lambda: [0, 1, 2], help="Seeds that draw pairs, patches and adapters.")
    max_train_steps: int = flag(200, "Number of training steps of each cell.")
    resolution: int = flag(64, "Side of the square training patches in pixels.")
    per_device_train_batch_size: int = flag(4, "Number of patches a step.")
    validation_pairs: int = flag(18, "Number of pairs that are held out of the training folder to validate on.")
    part: str = flag("0/1", "Share of the work for this process, as in 0/2 and 1/2 for two processes.")


@dataclass(kw_only=True)
class NetworkArguments(GridArguments):
    """Flags of grids in which all cells start from one network and train on one number of pairs."""

    model_name_or_path: str = flag(NETWORK, "Folder of the pre-trained network that every cell starts from.")
    train_pairs: int = flag(16, "Number of pairs to train on, drawn by the seed.")


def check_lists(lists: dict[str, Sequence[object]]) -> None:
    """Refuses flags that list nothing, or a value twice."""
    for name, values in lists.items():
        if not values or len(set(values)) < len(values):
            raise ValueError(f"--{name} must list at least one value and none twice, got {values}.")


def own_accelerator() -> Accelerator:
    """The accelerator of a process that runs cells by itself, on all its cores.

    Raises:
        ValueError: Several processes were launched.
    """
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise ValueError("A cell runs in one process: start several with --part instead of launching them.")
    use_all_cores(accelerator)
    return accelerator


def own_part(grid: Sequence[T], part: str) -> Sequence[T]:
    """Every n-th entry of `grid`, from the k-th on, for a `part` of "k/n".

    Raises:
        ValueError: `part` is not of this form with 0 <= k < n.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    first, count = (int(number) for number in match.groups()) if match else (0, 0)
    if first >= count:
        raise ValueError(f"The part is {part!r}: give k/n with 0 <= k < n, for example 0/2 and 1/2.")
    return grid[first::count]


def task_name(train_dir: str) -> str:
    """The name of the task whose training folder is TASK/train."""
    return Path(train_dir).resolve().parent.name


# ------------------------------------------------------------------------------------------------------------ cells


class CellFile:
    """The cells of a grid in one JSON file that grows over many calls.

    Several processes may write into it at once. An interrupted call loses one cell at most.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.cells: list[Cell] = []
        self._read()

    def _read(self) -> None:
        if self.path.is_file():
            self.cells = json.loads(self.path.read_text(encoding="utf-8"))

    def find(self, settings: Cell) -> Cell | None:
        """The first cell that was run with these settings, by this process or another; None if there is none."""
        return next(iter(self.find_all(settings)), None)

    def find_all(self, settings: Cell) -> list[Cell]:
        """All cells that were run with these settings; a setting of None is absent in them."""
        self._read()
        return [cell for cell in self.cells if all(cell.get(name) == value for name, value in settings.items())]

    def add(self, cell: Cell, in_place_of: Cell | None = None) -> None:
        """Adds `cell` to the cells that the file holds by now, and takes out the other."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")):
            self._read()
            self.cells = [other for other in self.cells if other != in_place_of] + [cell]
            write_json(self.path, self.cells)


def run_arguments(args: GridArguments, output_dir: str, learning_rate: float, seed: int) -> FinetuneArguments:
    """Flags of finetune.py that a cell runs with, on the mean absolute error alone."""
    return FinetuneArguments(
        output_dir=output_dir,
        learning_rate=learning_rate,
        seed=seed,
        max_train_steps=args.max_train_steps,
        resolution=args.resolution,
        per_device_train_batch_size=args.per_device_train_batch_size,
        checkpointing_steps=args.max_train_steps,
        checkerboard_weight=0.0,
    )


def train_and_validate(
    model: nn.Module,
    patches: PairedPatches,
    validation: PairSource,
    run: FinetuneArguments,
    accelerator: Accelerator,
    also: Callable[[nn.Module], Cell] | None = None,
) -> Cell:
    """Trains once and measures quality on the pairs to validate on.

    Returns:
        Quality, sizes, seconds, hardware and versions; on a GPU the peak memory of training (on a CPU it would be that
        of all that the process ran before). A run that diverges has `failed` in place of quality. `also` measures more
        of the trained network; if it cannot, that is `also_failed`, and the rest stays.
    """
    found: Cell = {**trained_parameters(model), "hardware": hardware_name(accelerator.device), **versions()}
    on_gpu = accelerator.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    try:
        model, found["seconds"] = train(model, patches, run, accelerator)
        if on_gpu:
            found["training_memory_bytes"] = torch.cuda.max_memory_allocated(accelerator.device)
        found |= evaluate(model, validation, accelerator.device, "validation")
        if also is not None:
            found |= also(model)
    except TrainingDiverged as error:
        found["failed"] = str(error)
    except (ValueError, OSError) as error:
        if "psnr" not in found:
            raise
        found["also_failed"] = str(error)
    finally:
        accelerator.free_memory()
    return found


def versions() -> dict[str, str]:
    """Versions of the packages that decide the outcome of a run."""
    names = ("torch", "peft", "transformers", "accelerate", "colora-peft")
    return {name: importlib.metadata.version(name) for name in names}


# ---------------------------------------------------------------------------------------------------------- network


def check_network(path: str) -> None:
    """Refuses the name of a network that experiments read if it has not been made yet.

    Raises:
        FileNotFoundError: Names the page that holds the command.
    """
    card = NETWORKS / Path(path).name / "README.md"
    if card.is_file() and not Path(path, "model.safetensors").is_file():
        raise FileNotFoundError(
            f"There is no network in {path}. It is not shipped: make it with the command in {relative_path(card)}."
        )


@cache
def network_fingerprint(path: str) -> str:
    """First digits of the hash of the file of weights in a network's folder."""
    check_network(path)
    return digest_of_bytes(Path(path, "model.safetensors").read_bytes())[:16]


def load_network(path: str, accelerator: Accelerator) -> nn.Module:
    """The network that a cell starts from."""
    check_network(path)
    return load_network_of(FinetuneArguments(model_name_or_path=path), accelerator)


# ------------------------------------------------------------------------------------------------------------ pairs


Validation = Literal["drawn", "block"]
"""Which pairs are held out: see `split_pairs`."""


def split_pairs(
    train_dir: str,
    train_pairs: int,
    validation_pairs: int,
    seed: int,
    validation: Validation = "block",
) -> tuple[PairSource, PairSource]:
    """Pairs to train on, drawn by the seed, and others to validate on.

    Args:
        validation: `block`: neighbours in the list, another block for each seed, as if from the same place;
            `drawn`: by the seed, as if from the same places.

    Raises:
        ValueError: The folder holds too few pairs.
    """
    pairs = PairedImageFolder(train_dir)
    if len(pairs) < train_pairs + validation_pairs:
        raise ValueError(
            f"{train_dir} holds {len(pairs)} pairs, too few to train on {train_pairs} and validate on "
            f"{validation_pairs}."
        )
    if validation == "drawn":
        validation_set, others = draw_pairs(pairs, validation_pairs, seed)
        return draw_pairs(others, train_pairs, seed)[0], validation_set
    first = seed % (len(pairs) // validation_pairs) * validation_pairs
    held_out = range(first, first + validation_pairs)
    others = PairSubset(pairs, [index for index in range(len(pairs)) if index not in held_out])
    return draw_pairs(others, train_pairs, seed)[0], PairSubset(pairs, held_out)


def split_up_to(
    train_dir: str, train_pairs: int, validation_pairs: int, seed: int, validation: Validation
) -> tuple[PairSource, PairSource]:
    """Splits as `split_pairs` does, with fewer pairs to train on where those held out leave no more.

    Raises:
        ValueError: None are left.
    """
    left = len(PairedImageFolder(train_dir)) - validation_pairs
    if left <= 0:
        raise ValueError(
            f"{train_dir} holds {left + validation_pairs} pairs: lower --validation_pairs {validation_pairs}."
        )
    return split_pairs(train_dir, min(train_pairs, left), validation_pairs, seed, validation)


class PairCentres:
    """The centres of another source's pairs, `size` pixels square, or all of a side that is smaller."""

    def __init__(self, pairs: PairSource, size: int) -> None:
        self.names = pairs.names
        self._pairs = pairs
        self._size = size

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Pair:
        pair = self._pairs[index]
        height, width = (min(self._size, side) for side in pair[0].shape[1:])
        top, left = ((side - own) // 2 for side, own in zip(pair[0].shape[1:], (height, width), strict=True))
        degraded, target = (image[:, top : top + height, left : left + width] for image in pair)
        return degraded, target
