"""Several tasks on one network: an adapter for each, a switch between them in milliseconds, two of them at once.

    python examples/tasks.py

lists the shipped adapters and measures the switch.

    python examples/tasks.py --data_dir photos --tasks haze rain

trains an adapter for each of the folders haze and rain below `photos`, which hold train/ and test/, each with input/
and target/. It then measures each adapter and their sum on both tasks. What is trained is kept: stop it and call it
again, it goes on.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import ClassVar

import torch
from finetune import SHIPPED_NETWORK, FinetuneArguments
from finetune import main as finetune

from colora_peft.data import PairedImageFolder, PairSource, PairSubset, draw_pairs
from colora_peft.evaluation import evaluate, restore_some, save_before_after
from colora_peft.hub import load_backbone
from colora_peft.inference import reconstruct
from colora_peft.restore import NO_ADAPTER, AdapterSet, adapters_in
from colora_peft.training import DataFailed, TrainingDiverged, list_checkpoints
from colora_peft.utils import (
    check_at_least,
    check_writable,
    default_device,
    flag,
    relative_path,
    run_script,
    write_text,
)

HERE = Path(__file__).parent
SHIPPED = HERE / "adapters"
METRICS_FILE = "metrics.json"
RUN_FILE = "run.json"
REPORT_FILE = "tasks.md"
BLEND = "blend"
SWITCHES = 30
IMAGE_PX = 256
# Photos of `--picture`, by their adapter.
EXAMPLES = {"underwater": ("76", "66", "89"), "rain": ("rocket",)}
CHOSEN = (
    "model_name_or_path",
    "train_dir",
    "max_train_samples",
    "max_train_steps",
    "resolution",
    "checkerboard_weight",
    "seed",
)


class TaskRunArguments(FinetuneArguments):
    """Flags of finetune.py for a run that goes on when this script is called again."""

    way_to_go_on: ClassVar[str] = "the same command"


@dataclass
class TasksArguments:
    """Flags of the script; what is not among them is as in finetune.py."""

    data_dir: str | None = flag(None, "Path to a folder with TASK/train and TASK/test. Default: nothing is trained.")
    tasks: list[str] | None = flag(
        None, "Names of the tasks. Default: all in --data_dir, or all adapters that are there."
    )
    input_pattern: str = flag("{}", "Names of the inputs without suffix, such as '{}_noisy'; see finetune.py.")
    target_pattern: str = flag("{}", "Names of the targets, such as '{}_clean'.")
    model_name_or_path: str = flag(SHIPPED_NETWORK, "The network that all tasks share.")
    output_dir: str | None = flag(
        None,
        "Path to a folder with an adapter for each task. Default: outputs/tasks, or without --data_dir the "
        "shipped ones.",
    )
    blend: list[str] | None = flag(None, "The two tasks that one adapter is to do at once. Default: the first two.")
    blend_weights: list[float] = flag(help="Weight of each of the two.", factory=lambda: [0.5, 0.5])
    blend_samples: int | None = flag(
        None, "Number of test pairs of each to measure on, drawn by the seed. Default: all."
    )
    picture: str | None = flag(
        None, "Path of an image to draw of the shipped example photos, each restored by its adapter."
    )
    max_train_samples: int | None = flag(
        None, "Number of pairs of each task to train on, drawn by the seed. Default: all."
    )
    max_train_steps: int = flag(FinetuneArguments.max_train_steps, "Number of optimiser steps of each task.")
    resolution: int = flag(FinetuneArguments.resolution, "Side of the square training patches in pixels.")
    checkerboard_weight: float = flag(
        FinetuneArguments.checkerboard_weight, "Weight of the loss on grids, see finetune.py. Older runs go on with 0."
    )
    seed: int = flag(FinetuneArguments.seed, "Seed of everything random.")

    def __post_init__(self) -> None:
        check_at_least(self, "max_train_steps", 1)
        if self.blend_samples is not None:
            check_at_least(self, "blend_samples", 1)
        if self.output_dir is None:
            self.output_dir = relative_path(SHIPPED) if self.data_dir is None else "outputs/tasks"
        if self.tasks is None:
            self.tasks = list(adapters_in(self.output_dir)) if self.data_dir is None else tasks_in(self.data_dir)
        self.blend = self.blend or self.tasks[:2]
        if len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"--tasks are {' '.join(self.tasks)}: name each once.")
        if len(self.tasks) > 1 and (len(self.blend) != 2 or not set(self.blend) <= set(self.tasks)):
            raise ValueError(f"--blend is {' '.join(self.blend)}: name two of --tasks ({' '.join(self.tasks)}).")
        if len(self.blend_weights) != 2:
            raise ValueError(f"--blend_weights are {self.blend_weights}: give two numbers.")

    def adapter_dir(self, task: str) -> Path:
        return Path(self.output_dir) / task

    def finetune_arguments(self, task: str) -> TaskRunArguments:
        """The flags of finetune.py for a task; with the newest checkpoint if it was stopped."""
        data, output_dir = Path(self.data_dir) / task, self.adapter_dir(task)
        return TaskRunArguments(
            model_name_or_path=self.model_name_or_path,
            train_dir=str(data / "train"),
            eval_dir=str(data / "test"),
            input_pattern=self.input_pattern,
            target_pattern=self.target_pattern,
            output_dir=str(output_dir),
            max_train_samples=self.max_train_samples,
            max_train_steps=self.max_train_steps,
            resolution=self.resolution,
            checkerboard_weight=self.checkerboard_weight,
            seed=self.seed,
            resume_from_checkpoint="latest" if list_checkpoints(output_dir) else None,
        )


def tasks_in(data_dir: str | Path) -> list[str]:
    """Names of the folders below `data_dir` that hold train/ and test/, sorted.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: There are none in it.
    """
    folder = Path(data_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}; check the path.")
    tasks = [path.name for path in sorted(folder.iterdir()) if (path / "train").is_dir() and (path / "test").is_dir()]
    if not tasks:
        raise ValueError(f"No folder below {folder} holds train/ and test/; name the folder that holds the tasks.")
    return tasks


# ------------------------------------------------------------------------------------------------------------ train


def train_missing(args: TasksArguments) -> None:
    """Trains an adapter for each task that has none yet, one after another; the pairs of all are looked at before."""
    has_adapter = {task: (args.adapter_dir(task) / METRICS_FILE).is_file() for task in args.tasks}  # written last
    for task in args.tasks:
        if not has_adapter[task]:
            for side in ("train", "test"):
                PairedImageFolder(Path(args.data_dir) / task / side, args.input_pattern, args.target_pattern)
    for task in args.tasks:
        if has_adapter[task]:
            print(f"{task}: kept, in {args.adapter_dir(task)}{note_on_settings(args, task)}.")
        else:
            print(f"\n{task}: training.")
            finetune(args.finetune_arguments(task))


def note_on_settings(args: TasksArguments, task: str) -> str:
    """A note on settings of the adapter's training that differ from those of now; empty where none does."""
    file = args.adapter_dir(task) / RUN_FILE
    if not file.is_file():
        return ""
    then, now = json.loads(file.read_text(encoding="utf-8")), asdict(args.finetune_arguments(task))
    changed = [name for name in CHOSEN if then.get(name) != now[name]]
    return "".join(f", trained with --{name} {then.get(name)} (now {now[name]})" for name in changed)


# ----------------------------------------------------------------------------------------------------------- report


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def size_kb(folder: Path) -> float:
    return sum((folder / name).stat().st_size for name in ("adapter_model.safetensors", "adapter_config.json")) / 1e3


def overview(args: TasksArguments, adapters: AdapterSet) -> str:
    """Loads the adapter of each task, and reports what it gained in its training run."""
    rows = []
    for task in args.tasks:
        folder = args.adapter_dir(task)
        start = time.perf_counter()
        adapters.add(task, folder)
        milliseconds = 1e3 * (time.perf_counter() - start)
        metrics = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
        psnr = [f"{metrics[f'psnr_{when}']:.2f}" for when in ("input", "before", "after")]
        pairs = f"{metrics['train_pairs']} / {metrics['eval_pairs']}"
        rows.append([task, pairs, *psnr, f"{size_kb(folder):.0f} kB", f"{milliseconds:.0f} ms"])
    head = ["task", "pairs: train / test", "input (dB)", "before", "after", "size", "loaded in"]
    return table(head, rows)


def switching(adapters: AdapterSet, device: torch.device) -> str:
    """Time from one adapter to the next, and of the first run after it, which builds the weights."""
    image = torch.rand(1, 3, IMAGE_PX, IMAGE_PX, device=device)
    labels = adapters.labels
    with torch.no_grad():
        times = [switch_once(adapters, labels[turn % len(labels)], image) for turn in range(SWITCHES)]
    times = times[len(labels) :]  # the first time takes longer
    (change, first, following), (busy, *_) = (
        [1e3 * median(column) for column in zip(*rows, strict=True)] for rows in zip(*times, strict=True)
    )
    return (
        f"A switch takes {change:.1f} ms ({busy:.1f} ms of processor time); then the first image of "
        f"{IMAGE_PX} x {IMAGE_PX} takes {first:.0f} ms, the next {following:.0f} ms "
        f"({torch.get_num_threads()} threads, medians of {len(times)})."
    )


def switch_once(adapters: AdapterSet, label: str, image: torch.Tensor) -> list[list[float]]:
    """Seconds of the switch, of the first run and of the next: on the clock, and of the processors."""
    stamps = [(time.perf_counter(), time.process_time())]
    model = adapters.activate(label)
    for _ in range(2):
        stamps.append((time.perf_counter(), time.process_time()))
        reconstruct(model, image).sum().item()  # waits for a GPU
    stamps.append((time.perf_counter(), time.process_time()))
    return [[end - start for start, end in pairwise(times)] for times in zip(*stamps, strict=True)]


def blending(args: TasksArguments, adapters: AdapterSet, device: torch.device) -> str:
    """PSNR of both tasks under the bare network, each adapter, and their weighted sum."""
    tests = {task: test_pairs(args, task) for task in args.blend}
    adapters.blend(args.blend, args.blend_weights, BLEND)
    rows = []
    for label in (NO_ADAPTER, *args.blend, BLEND):
        model = adapters.activate(label)
        psnr = [evaluate(model, pairs, device, "measuring")["psnr"] for pairs in tests.values()]
        rows.append([label, *(f"{value:.2f}" for value in psnr)])
    sum_of = " + ".join(f"{weight:g} {task}" for weight, task in zip(args.blend_weights, args.blend, strict=True))
    counts = " and ".join(str(len(pairs)) for pairs in tests.values())
    return f"PSNR (dB) on {counts} test pairs; {BLEND} is {sum_of}.\n\n{table(['adapter', *tests], rows)}"


def test_pairs(args: TasksArguments, task: str) -> PairSource:
    """The pairs of a task's test folder that are measured."""
    pairs = PairedImageFolder(Path(args.data_dir) / task / "test", args.input_pattern, args.target_pattern)
    if args.blend_samples is None or args.blend_samples >= len(pairs):
        return pairs
    return draw_pairs(pairs, args.blend_samples, args.seed)[0]


def draw_examples(adapters: AdapterSet, path: str) -> None:
    """Draws the example photos of the adapters that are loaded: input, restored, target."""
    rows = []
    for label, names in EXAMPLES.items():
        if label in adapters.labels:
            pairs = PairedImageFolder(HERE / "data" / label / "test")
            chosen = PairSubset(pairs, [pairs.names.index(name) for name in names])
            rows += restore_some(adapters.activate(label), chosen, count=len(names))
    save_before_after(rows, path)


def main(args: TasksArguments) -> None:
    if args.data_dir is not None:
        check_writable(args.output_dir)
    if args.picture is not None:
        check_writable(Path(args.picture).parent, "The folder of --picture")
    if args.data_dir is not None:
        train_missing(args)
    device = default_device()
    network = load_backbone(args.model_name_or_path).to(device, memory_format=torch.channels_last)
    adapters = AdapterSet(network, {})
    parts = [overview(args, adapters), switching(adapters, device)]
    print("\n" + "\n\n".join(parts))
    if args.picture is not None:
        draw_examples(adapters, args.picture)
    if args.data_dir is not None and len(args.tasks) > 1:
        parts.append(blending(args, adapters, device))
        print(f"\n{parts[-1]}")
        write_text(Path(args.output_dir) / REPORT_FILE, "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    run_script(main, TasksArguments, TrainingDiverged, DataFailed)
