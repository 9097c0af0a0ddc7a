"""Makes the shipped adapters anew, on the shipped network.

    python -m examples.experiments.base.ship --tasks_dir path/to/tasks

Every adapter is a launch of examples/finetune.py with its defaults. Of its folder, what may be passed on goes to
examples/adapters: weights, configuration, figures and card, and images only where the licence of the photos allows it.
The card says what the photos are and what the adapter is for. A finished run in --output_dir is not repeated.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from colora_peft.data import PairedImageFolder
from colora_peft.hub import load_backbone
from colora_peft.tuner import base_fingerprint
from colora_peft.utils import flag, relative_path, run_script, writing_folder

EXAMPLES = Path(__file__).parents[2]
FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "contribution.png",
    "metrics.json",
    "preprocessor_config.json",
)
IMAGES = "before_after.png"
BASE = "checkpoints/nafnet-small-prod"
MAX_PAIRS = 64

LICENCE = """license: other
license_name: non-commercial-research
"""
"""The licence of the base, whatever the photos have."""


@dataclass(frozen=True)
class Task:
    """The words of a card about the photos of a task."""

    data: str
    """Source and licence, as `--data_card`."""
    about: str
    """The first paragraph of the card."""
    may_show_images: bool = False


TASKS = {
    "underwater": Task(
        "underwater photos of LSUI from the U-shape Transformer repository (MIT)",
        "Photos of LSUI (MIT). The base was trained on photos for non-commercial research, so what this adapter makes "
        "of it is for that, too. The held-out photos come from the dives that the training photos show; photos of "
        "other waters are harder.",
        may_show_images=True,
    ),
    "noise": Task(
        "real camera noise and means of many shots: PolyU real-world noisy images, for non-commercial research; the "
        "adapter is for that, too",
        "Photos of PolyU (real-world noisy images, non-commercial research): the adapter is for that alone, and no "
        "photo is shown. It knows the noise of five cameras with their own processing; noise of another kind may be "
        "worse with it than without.",
    ),
    "rain": Task(
        "synthetic heavy rain on photos of BSDS: Rain100H, no licence stated; take the adapter for research alone",
        "Photos of Rain100H, synthetic streaks on BSDS photos, for which no licence is stated: take the adapter for "
        "research alone. No photo is shown. It knows heavy bright streaks; rain of another kind may be worse with it "
        "than without.",
    ),
    "lowlight": Task(
        "real short and long exposures: LOL, for research; the adapter is for that, too",
        "Photos of LOL, for research: the adapter is for that alone, and no photo is shown. It knows exposures "
        "that were far too short, and is for such images alone.",
    ),
    "haze": Task(
        "synthetic haze in rooms: SOTS indoor of RESIDE, for research; the adapter is for that, too",
        "Photos of SOTS indoor (RESIDE), for research: the adapter is for that alone, and no photo is shown. The haze "
        "is synthetic, computed from depth. Real haze outdoors looks different.",
    ),
    "shadow": Task(
        "real shadows with repaired targets: UIUC and Gong, for research; the adapter is for that, too",
        "Photos of the shadow sets of UIUC and of Gong, for research: the adapter is for that alone, and no photo is "
        "shown. It knows hard shadows on the ground and on walls.",
    ),
}


@dataclass
class ShipArguments:
    """Flags of the script."""

    tasks_dir: str = flag(
        help="Folder whose folders TASK/train and TASK/test hold pairs; not for underwater, see examples/data."
    )
    tasks: list[str] = flag(factory=lambda: list(TASKS), help="Names of the tasks.")
    output_dir: str = flag("outputs/adapters", "Folder for the whole results of the runs.")

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown:
            raise ValueError(f"--tasks knows {', '.join(TASKS)}, not {', '.join(unknown)}.")


def finetune_flags(args: ShipArguments, name: str) -> list[str]:
    """Flags of finetune.py for a task; underwater has those of the first command of the README."""
    flags = ["--output_dir", str(Path(args.output_dir) / name)]
    if name == "underwater":
        return flags
    folder = Path(args.tasks_dir) / name
    pairs = min(MAX_PAIRS, len(PairedImageFolder(folder / "train")))
    flags += ["--train_dir", str(folder / "train"), "--eval_dir", str(folder / "test")]
    return [*flags, "--max_train_samples", str(pairs), "--data_card", TASKS[name].data]


def ship(run_dir: Path, name: str, tasks_dir: str) -> Path:
    """Copies what may be passed on of a finished run to the shipped adapters, with its card.

    Raises:
        ValueError: The run adapted another network than the shipped one, or its card has another form; nothing was
            changed.
    """
    config = json.loads((run_dir / "adapter_config.json").read_text(encoding="utf-8"))
    if config["base_fingerprint"] != base_fingerprint(load_backbone(str(EXAMPLES / BASE))):
        raise ValueError(f"{run_dir} holds an adapter of another network than {BASE}: delete it to train it anew.")
    text = card((run_dir / "README.md").read_text(encoding="utf-8"), name, str(run_dir), tasks_dir)
    folder = EXAMPLES / "adapters" / name
    with writing_folder(folder) as partial:
        for file in FILES:
            shutil.copy(run_dir / file, partial)
        if TASKS[name].may_show_images:
            Image.open(run_dir / IMAGES).convert("RGB").save(partial / "before_after.jpg", quality=88)
        (partial / "README.md").write_text(text, encoding="utf-8")
    return folder


def card(text: str, name: str, run_dir: str, tasks_dir: str) -> str:
    """Returns the card of a shipped adapter, from that of its run.

    Raises:
        ValueError: The text lacks a place that is to be changed.
    """
    task = TASKS[name]
    images = f"![input, restored, target]({IMAGES})\n\n"
    changes = {
        "model-index:\n": f"{LICENCE}model-index:\n",
        f"# {name}\n\n": f"# {name}\n\n{task.about}\n\n",
        images: images.replace(IMAGES, "before_after.jpg") if task.may_show_images else "",
    }
    for before, after in changes.items():
        if before not in text:
            raise ValueError(f"The card of {run_dir} has no {before.strip()!r}: change card() in {__name__}.")
        text = text.replace(before, after, 1)
    return text.replace(run_dir, f"examples/adapters/{name}").replace(f"{Path(tasks_dir)}/", "data/")


def main(args: ShipArguments) -> None:
    for name in args.tasks:
        run_dir = Path(args.output_dir) / name
        if not (run_dir / "metrics.json").is_file():
            command = [sys.executable, relative_path(EXAMPLES / "finetune.py"), *finetune_flags(args, name)]
            subprocess.run([*command, "--resume_from_checkpoint", "latest"], check=True)
        folder = ship(run_dir, name, args.tasks_dir)
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        size = (folder / "adapter_model.safetensors").stat().st_size + (folder / "adapter_config.json").stat().st_size
        figures = [f"{metrics[f'psnr_{when}']:.2f} dB" for when in ("input", "before", "after")]
        pairs = f"{metrics['train_pairs']} / {metrics['eval_pairs']}"
        print(f"| {name} | {pairs} | {' | '.join(figures)} | {size / 1000:.0f} kB |", flush=True)


if __name__ == "__main__":
    run_script(main, ShipArguments, subprocess.CalledProcessError)
