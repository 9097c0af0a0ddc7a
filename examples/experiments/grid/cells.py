"""What grids of experiments share: cells, each a whole fine-tuning measured on other pairs, run once and kept."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import restoration_task
import torch
from accelerate import Accelerator
from filelock import FileLock
from finetune import FinetuneArguments
from torch import nn

from colora_peft.data import Pair, PairedImageFolder, PairedPatches, PairSource, PairSubset, draw_pairs
from colora_peft.evaluation import evaluate
from colora_peft.hub import hardware_name
from colora_peft.training import TrainingDiverged, train, trained_parameters
from colora_peft.utils import relative_path, write_json

RESULTS = Path(__file__).parent / "benchmark_results"

NETWORK = relative_path(Path(__file__).parent / "checkpoints" / "nafnet-small-prod-v1")
"""What every cell of the studies of the method starts from. It stays when the shipped network is trained anew, so that
cells of different days can be compared."""

Cell = dict[str, object]
"""Settings of a run and what came of it, as JSON keeps them."""

T = TypeVar("T")


class CellFile:
    """The cells of a grid in one JSON file, growing over many calls; an interrupted one loses one cell at most.

    Several processes may write into it at once.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.cells: list[Cell] = []
        self._read()

    def _read(self) -> None:
        if self.path.is_file():
            self.cells = json.loads(self.path.read_text(encoding="utf-8"))

    def find(self, settings: Cell) -> Cell | None:
        """The cell that was run with these settings; a setting of None is one that the cell does not have.

        What other processes have added by now counts.
        """
        self._read()
        wanted = settings.items()
        return next((cell for cell in self.cells if all(cell.get(name) == value for name, value in wanted)), None)

    def add(self, cell: Cell, in_place_of: Cell | None = None) -> None:
        """Add `cell` to what the file holds by now, and take out the other."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")):
            self._read()
            self.cells = [other for other in self.cells if other != in_place_of] + [cell]
            write_json(self.path, self.cells)


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
    """Of a folder TASK/train."""
    return Path(train_dir).resolve().parent.name


@cache
def network_fingerprint() -> str:
    """First digits of the hash of the weights that every cell starts from."""
    return hashlib.sha256((Path(NETWORK) / "model.safetensors").read_bytes()).hexdigest()[:16]


def load_network(accelerator: Accelerator) -> nn.Module:
    """The network that every cell starts from."""
    return restoration_task.load_network(FinetuneArguments(model_name_or_path=NETWORK), accelerator)


def run_arguments(args: Any, output_dir: str, learning_rate: float, seed: int) -> FinetuneArguments:
    """Flags of a cell's run; `args` are a grid's, which says how long it is and on what patches."""
    return FinetuneArguments(
        output_dir=output_dir,
        learning_rate=learning_rate,
        seed=seed,
        max_train_steps=args.max_train_steps,
        resolution=args.resolution,
        per_device_train_batch_size=args.per_device_train_batch_size,
        checkpointing_steps=args.max_train_steps,
    )


def split_pairs(
    train_dir: str,
    train_pairs: int,
    validation_pairs: int,
    seed: int,
    validation: Literal["block", "colours", "drawn"] = "block",
) -> tuple[PairSource, PairSource]:
    """Pairs to train on, drawn by the seed, and others to validate on.

    Args:
        validation: `block`: neighbours in the list, another block for each seed, as if from the same place;
            `colours`: the pairs whose colours are the strangest, as if from another place; `drawn`: by the seed, as
            if from the same places.

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
    if validation == "colours":
        held_out = strangest_colours(pairs, validation_pairs)
    else:
        first = seed % (len(pairs) // validation_pairs) * validation_pairs
        held_out = list(range(first, first + validation_pairs))
    others = PairSubset(pairs, [index for index in range(len(pairs)) if index not in held_out])
    return draw_pairs(others, train_pairs, seed)[0], PairSubset(pairs, held_out)


def strangest_colours(pairs: PairSource, count: int) -> list[int]:
    """The pairs whose inputs' mean colours lie farthest from the median one."""
    colours = torch.stack([pairs[index][0].mean((1, 2)) for index in range(len(pairs))])
    distances = (colours - colours.median(0).values).norm(dim=1)
    return sorted(distances.topk(count).indices.tolist())


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


def train_and_validate(
    model: nn.Module,
    patches: PairedPatches,
    validation: PairSource,
    run: FinetuneArguments,
    accelerator: Accelerator,
    also: Callable[[nn.Module], Cell] | None = None,
) -> Cell:
    """Train once: quality on the pairs to validate on, sizes, seconds, hardware and versions, or that the run has
    `failed`; on a GPU the peak memory of training (on a CPU it would be that of all that the process ran before).

    `also` measures more of the trained network; if it cannot, that is `also_failed`, and the rest stays.
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
    """Of the packages that decide what comes of a run."""
    names = ("torch", "peft", "transformers", "accelerate", "colora-peft")
    return {name: importlib.metadata.version(name) for name in names}
