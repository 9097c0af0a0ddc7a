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
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch
from adapter_switch import NO_ADAPTER, AdapterSwitch, adapters_in
from example_photos import example_photos
from finetune import FinetuneArguments
from finetune import main as finetune
from restoration_task import HERE, TaskArguments
from safetensors import SafetensorError
from torch import nn
from transformers import HfArgumentParser

from colora_peft.data import PairedImageFolder, PairSource, draw_pairs
from colora_peft.evaluation import evaluate, save_before_after
from colora_peft.inference import reconstruct
from colora_peft.training import DataFailed, TrainingDiverged, list_checkpoints
from colora_peft.utils import check_at_least, relative_path, write_text

SHIPPED = HERE / "adapters"
METRICS_FILE = "metrics.json"
RUN_FILE = "run.json"
REPORT_FILE = "tasks.md"
BLEND = "blend"
SWITCHES = 30
IMAGE_PX = 256
CHOSEN = ("model_name_or_path", "train_dir", "max_train_samples", "max_train_steps", "resolution", "seed")


@dataclass
class TasksArguments:
    """Flags of the script; what is not among them is as in finetune.py."""

    data_dir: str | None = field(
        default=None, metadata={"help": "Folder with TASK/train and TASK/test. Default: nothing is trained."}
    )
    tasks: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the tasks. Default: all in --data_dir, or all adapters that are there."},
    )
    model_name_or_path: str = field(
        default=TaskArguments.model_name_or_path, metadata={"help": "The network that all tasks share."}
    )
    output_dir: str | None = field(
        default=None,
        metadata={"help": "Folder with an adapter for each task. Default: outputs/tasks, or without --data_dir the "
                  "shipped ones."},
    )  # fmt: skip
    blend: list[str] | None = field(
        default=None, metadata={"help": "The two tasks that one adapter is to do at once. Default: the first two."}
    )
    blend_weights: list[float] = field(
        default_factory=lambda: [0.5, 0.5], metadata={"help": "How much of each of the two."}
    )
    blend_samples: int | None = field(
        default=None, metadata={"help": "Measure on this many test pairs of each, drawn by the seed. Default: all."}
    )
    image: str | None = field(
        default=None,
        metadata={"help": "File for an image of the shipped example photos, each restored by its adapter."},
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on this many pairs of each task, drawn by the seed. Default: all."}
    )
    max_train_steps: int = field(default=FinetuneArguments.max_train_steps, metadata={"help": "Steps of each task."})
    resolution: int = field(default=TaskArguments.resolution, metadata={"help": "Side of the training patches."})
    seed: int = field(default=TaskArguments.seed, metadata={"help": "Seed of everything random."})

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

    def finetune_arguments(self, task: str) -> FinetuneArguments:
        """What finetune.py would be called with; with the newest checkpoint if it was stopped."""
        data, output_dir = Path(self.data_dir) / task, self.adapter_dir(task)
        return FinetuneArguments(
            model_name_or_path=self.model_name_or_path,
            train_dir=str(data / "train"),
            eval_dir=str(data / "test"),
            output_dir=str(output_dir),
            max_train_samples=self.max_train_samples,
            max_train_steps=self.max_train_steps,
            resolution=self.resolution,
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
    """Train an adapter for each task that has none yet, one after another."""
    for task in args.tasks:
        if (args.adapter_dir(task) / METRICS_FILE).is_file():  # what finetune.py writes last
            print(f"{task}: kept, in {args.adapter_dir(task)}{note_on_settings(args, task)}.")
        else:
            print(f"\n{task}: training.")
            finetune(args.finetune_arguments(task))


def note_on_settings(args: TasksArguments, task: str) -> str:
    """Which settings an adapter was trained with that are not those of now; empty where none, or nobody noted them."""
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


def overview(args: TasksArguments, switch: AdapterSwitch) -> str:
    """Load the adapter of each task, with what it gained in its training run."""
    rows = []
    for task in args.tasks:
        folder = args.adapter_dir(task)
        start = time.perf_counter()
        switch.add(task, folder)
        milliseconds = 1e3 * (time.perf_counter() - start)
        metrics = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
        psnr = [f"{metrics[f'psnr_{when}']:.2f}" for when in ("input", "before", "after")]
        pairs = f"{metrics['train_pairs']} / {metrics['eval_pairs']}"
        rows.append([task, pairs, *psnr, f"{size_kb(folder):.0f} kB", f"{milliseconds:.0f} ms"])
    head = ["task", "pairs: train / test", "input (dB)", "before", "after", "size", "loaded in"]
    return table(head, rows)


def switching(switch: AdapterSwitch) -> str:
    """How long it takes to go from one adapter to the next, and the first run after it, which builds the weights."""
    image = torch.rand(1, 3, IMAGE_PX, IMAGE_PX, device=switch.device)
    with torch.inference_mode():
        times = [switch_once(switch, switch.names[turn % len(switch.names)], image) for turn in range(SWITCHES)]
    times = times[len(switch.names) :]  # what is done for the first time takes longer
    (change, first, following), (busy, *_) = (
        [1e3 * median(column) for column in zip(*rows, strict=True)] for rows in zip(*times, strict=True)
    )
    return (
        f"A switch takes {change:.1f} ms ({busy:.1f} ms of processor time); then the first image of "
        f"{IMAGE_PX} x {IMAGE_PX} takes {first:.0f} ms, the next {following:.0f} ms "
        f"({torch.get_num_threads()} threads, medians of {len(times)})."
    )


Times = tuple[list[float], list[float]]


def switch_once(switch: AdapterSwitch, name: str, image: torch.Tensor) -> Times:
    """Seconds of the switch, of the first run and of the next: on the clock, and of the processors."""
    steps = [lambda: switch.activate(name), *[lambda: reconstruct(switch.model, image).sum().item()] * 2]
    clock, processors = [], []
    for step in steps:  # .item() waits for a GPU
        start = time.perf_counter(), time.process_time()
        step()
        clock.append(time.perf_counter() - start[0])
        processors.append(time.process_time() - start[1])
    return clock, processors


def blending(args: TasksArguments, switch: AdapterSwitch) -> str:
    """PSNR of both tasks under the bare network, each adapter, and their weighted sum."""
    tests = {task: test_pairs(args, task) for task in args.blend}
    switch.blend(args.blend, args.blend_weights, BLEND)
    rows = []
    for name in (NO_ADAPTER, *args.blend, BLEND):
        with switch.at_work(name) as model:
            rows.append([name, *(f"{psnr_of(model, pairs, switch):.2f}" for pairs in tests.values())])
    sum_of = " + ".join(f"{weight:g} {task}" for weight, task in zip(args.blend_weights, args.blend, strict=True))
    counts = " and ".join(str(len(pairs)) for pairs in tests.values())
    return f"PSNR (dB) on {counts} test pairs; {BLEND} is {sum_of}.\n\n{table(['adapter', *tests], rows)}"


def test_pairs(args: TasksArguments, task: str) -> PairSource:
    pairs = PairedImageFolder(Path(args.data_dir) / task / "test")
    if args.blend_samples is None or args.blend_samples >= len(pairs):
        return pairs
    return draw_pairs(pairs, args.blend_samples, args.seed)[0]


def psnr_of(model: nn.Module, pairs: PairSource, switch: AdapterSwitch) -> float:
    return evaluate(model, pairs, switch.device, "measuring")["psnr"]


def draw_examples(switch: AdapterSwitch, path: str) -> None:
    """Draw the shipped example photos with an adapter among those loaded: input, restored, target."""
    rows = []
    for photo in example_photos(HERE / "data"):
        if photo.adapter in switch.names:
            with switch.at_work(photo.adapter) as model, torch.inference_mode():
                restored = reconstruct(model, photo.degraded[None].to(switch.device))[0].float().clamp(0, 1).cpu()
            rows.append((photo.degraded, restored, photo.clean))
    save_before_after(rows, path)


def main(args: TasksArguments) -> None:
    if args.data_dir is not None:
        train_missing(args)
    switch = AdapterSwitch(args.model_name_or_path, {})
    parts = [overview(args, switch), switching(switch)]
    print("\n" + "\n\n".join(parts))
    if args.image is not None:
        draw_examples(switch, args.image)
    if args.data_dir is not None and len(args.tasks) > 1:
        parts.append(blending(args, switch))
        print(f"\n{parts[-1]}")
        write_text(Path(args.output_dir) / REPORT_FILE, "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    try:
        (parsed,) = HfArgumentParser(TasksArguments).parse_args_into_dataclasses()
        main(parsed)
    except (ValueError, TypeError, OSError, ImportError, SafetensorError, TrainingDiverged, DataFailed) as error:
        sys.exit(f"tasks.py: {error}")
