"""Give a pre-trained network contributions that are to serve any task, so that `CoLoRAConfig()` on it needs no data.

    python examples/contribution_prior.py --train_dirs path/to/underwater/train path/to/noise/train path/to/rain/train

scores each folder (input/ and target/), takes the mean of the scores, each task counting alike, and writes it into the
config.json of --model_name_or_path as `colora_contributions`. What such a prior is worth on a task that is not among
them: examples/benchmark_results/contributions/report.md, "Scores of another task".
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from accelerate import Accelerator
from accelerate.utils import set_seed
from restoration_task import TaskArguments, load_network, measure_contributions
from transformers import HfArgumentParser

from colora_peft import ContributionScores
from colora_peft.data import PairedImageFolder, PairedPatches
from colora_peft.ranks import mean_scores
from colora_peft.training import use_all_cores
from colora_peft.tuner import PRIOR_CONTRIBUTIONS
from colora_peft.utils import write_json


@dataclass
class PriorArguments:
    """Flags of the prior."""

    train_dirs: list[str] = field(metadata={"help": "One folder with input/ and target/ for each task."})
    model_name_or_path: str = field(
        default=TaskArguments.model_name_or_path,
        metadata={"help": "Folder of the network; its config.json is changed."},
    )
    estimator: Literal["probe", "gradient", "fisher", "taylor"] = field(
        default=TaskArguments.estimator, metadata={"help": "As in finetune.py."}
    )
    resolution: int = field(default=TaskArguments.resolution, metadata={"help": "Side of the patches in pixels."})
    probe_batches: int = field(default=16, metadata={"help": "Batches of each task."})
    seed: int = field(default=0, metadata={"help": "Of the patches."})

    def __post_init__(self) -> None:
        if not (Path(self.model_name_or_path) / "config.json").is_file():
            raise ValueError(f"--model_name_or_path {self.model_name_or_path} is no folder with a config.json.")

    def tasks(self) -> list[TaskArguments]:
        own = {name: value for name, value in asdict(self).items() if name != "train_dirs"}
        return [TaskArguments(train_dir=folder, **own) for folder in self.train_dirs]


def measure(task: TaskArguments, accelerator: Accelerator) -> ContributionScores:
    set_seed(task.seed)
    network = load_network(task, accelerator)
    patches = PairedPatches(PairedImageFolder(task.train_dir), task.resolution, task.seed)
    return measure_contributions(network, patches, task, accelerator)


def main(args: PriorArguments) -> None:
    accelerator = Accelerator()
    use_all_cores(accelerator)
    scores = mean_scores([measure(task, accelerator) for task in args.tasks()])
    if accelerator.is_main_process:
        path = Path(args.model_name_or_path) / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        # Four digits: the ranks that follow do not see more, and the file stays readable.
        config[PRIOR_CONTRIBUTIONS] = {layer: float(f"{score:.4g}") for layer, score in scores.items()}
        write_json(path, config)
        print(f"The contributions of {len(scores)} layers are in {path}.")


if __name__ == "__main__":
    try:
        (parsed,) = HfArgumentParser(PriorArguments).parse_args_into_dataclasses()
        main(parsed)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"contribution_prior.py: {error}")
