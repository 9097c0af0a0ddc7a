"""What `finetune.py` and `contribution.py` share: network, pairs of a task, and what each layer contributes to it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from colora_peft import (
    CoLoRAConfig,
    ContributionScores,
    FaigSettings,
    ProbeSettings,
    adaptable_layers,
    estimate_contributions,
    weight_matrix_shape,
)
from colora_peft.contribution import Estimator
from colora_peft.data import PairedHubDataset, PairedImageFolder, PairedPatches, PairSource, check_pairs, draw_pairs
from colora_peft.evaluation import SSIM_WINDOW_PX
from colora_peft.hub import load_backbone
from colora_peft.ranks import check_figures_can_be_drawn as check_figures_can_be_drawn
from colora_peft.ranks import format_allocation_table, plot_contributions
from colora_peft.training import restoration_loss
from colora_peft.utils import check_at_least, check_seed, relative_path

HERE = Path(__file__).parent
CONTRIBUTIONS_FILE = "contributions.json"
FIGURE_FILE = "contribution.png"


@dataclass
class TaskArguments:
    """Flags of whatever looks at pairs of photos with a pre-trained network."""

    model_name_or_path: str = field(
        default=relative_path(HERE / "checkpoints" / "nafnet-small-prod"),
        metadata={"help": "The pre-trained network: a folder, an id on the Hub, or module:function."},
    )
    train_dir: str | None = field(
        default=None, metadata={"help": "Folder with input/ and target/. Default: the shipped underwater photos."}
    )
    eval_dir: str | None = field(
        default=None,
        metadata={"help": "The same for evaluation. With --train_dir alone, a fifth of its pairs is held out."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Instead of folders: a Hugging Face dataset (Hub id or folder) with the image columns "
                  "input and target; its test or validation split is for evaluation."},
    )  # fmt: skip
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on this many pairs, drawn by the seed. Default: all."}
    )
    resolution: int = field(default=128, metadata={"help": "Side of the square training patches in pixels."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Patches a step on each process."})
    seed: int = field(
        default=0, metadata={"help": "Seed of everything random; on one CPU set-up it fixes the result bitwise."}
    )
    parameter_budget: float = field(
        default=0.07, metadata={"help": "Trained share of the adapted weights, in (0, 1] (colora and lora)."}
    )
    beta: float = field(default=CoLoRAConfig.beta, metadata={"help": "From contribution to rank: 0 is uniform."})
    estimator: Estimator = field(
        default="gradient",
        metadata={"help": "How contributions are measured. gradient, fisher, taylor: one pass, no tuning; probe: tune "
                  "for --probe_steps and walk there; faig: walk to the weights of a fully tuned network."},
    )  # fmt: skip
    probe_steps: int = field(
        default=ProbeSettings.num_steps,
        metadata={"help": "Steps of the short full tuning that measures the contributions (--estimator probe)."},
    )
    probe_batches: int = field(default=4, metadata={"help": "Batches on which the contributions are measured."})

    def __post_init__(self) -> None:
        if self.dataset_name is not None and (self.train_dir or self.eval_dir):
            raise ValueError("--dataset_name and --train_dir or --eval_dir exclude each other; give one.")
        if self.eval_dir is not None and self.train_dir is None:
            raise ValueError("--eval_dir needs --train_dir; for the shipped photos give neither.")
        for name in ("probe_steps", "probe_batches", "resolution", "per_device_train_batch_size"):
            check_at_least(self, name, 1)
        check_seed(self.seed)
        self.adapter_config()  # refuses a wrong budget before anything is loaded

    def adapter_config(self, contributions: dict[str, float] | None = None) -> CoLoRAConfig:
        return CoLoRAConfig(contributions=contributions, parameter_budget=self.parameter_budget, beta=self.beta)

    def estimator_settings(self) -> FaigSettings | ProbeSettings | None:
        return ProbeSettings(num_steps=self.probe_steps) if self.estimator == "probe" else None


# ------------------------------------------------------------------------------------------------------------- data


def load_network(args: TaskArguments, accelerator: Accelerator) -> torch.nn.Module:
    return load_backbone(args.model_name_or_path).to(accelerator.device, memory_format=torch.channels_last)


def load_pairs(args: TaskArguments, accelerator: Accelerator) -> tuple[PairSource, PairSource]:
    """The pairs to train on and the pairs to evaluate on, all checked."""
    eval_pairs = None
    if args.dataset_name is not None:
        train_pairs, eval_pairs = load_hub_pairs(args)
    elif args.train_dir is None:
        shipped = HERE / "data" / "underwater"
        train_pairs, eval_pairs = PairedImageFolder(shipped / "train"), PairedImageFolder(shipped / "test")
    else:
        train_pairs = PairedImageFolder(args.train_dir)
        eval_pairs = PairedImageFolder(args.eval_dir) if args.eval_dir is not None else None
    if eval_pairs is None:
        if len(train_pairs) < 2:
            raise ValueError("One pair cannot be split for evaluation; give a separate --eval_dir.")
        eval_pairs, train_pairs = draw_pairs(train_pairs, max(1, len(train_pairs) // 5), args.seed)
        names = ", ".join(eval_pairs.names)
        accelerator.print(f"No evaluation pairs were given: {len(eval_pairs)} are held out ({names}).")
    if args.max_train_samples is not None:
        train_pairs, _ = draw_pairs(train_pairs, args.max_train_samples, args.seed)
    check_pairs(train_pairs, args.resolution, "the training patch: lower --resolution or remove the pair")
    check_pairs(eval_pairs, SSIM_WINDOW_PX, "SSIM's window: remove the pair")
    return train_pairs, eval_pairs


def load_hub_pairs(args: TaskArguments) -> tuple[PairSource, PairSource | None]:
    from datasets import load_dataset

    splits = load_dataset(args.dataset_name, args.dataset_config_name)
    if "train" not in splits:
        raise ValueError(f"{args.dataset_name} has the splits {sorted(splits)}; one must be called train.")
    held_out = next((splits[name] for name in ("test", "validation") if name in splits), None)
    return PairedHubDataset(splits["train"]), None if held_out is None else PairedHubDataset(held_out)


# ---------------------------------------------------------------------------------------------------- contributions


def measure_contributions(
    model: torch.nn.Module,
    patches: PairedPatches,
    args: TaskArguments,
    accelerator: Accelerator,
    end_state: dict[str, torch.Tensor] | None = None,
) -> ContributionScores:
    """Score the layers on the first patches of the run; the processes share them out."""
    size = args.per_device_train_batch_size
    samples = [patches[number] for number in range(args.probe_batches * size)]
    batches = [
        {key: torch.stack([sample[key] for sample in samples[first : first + size]]).to(accelerator.device)
         for key in samples[0]}
        for first in range(0, len(samples), size)
    ]  # fmt: skip
    contributions = estimate_contributions(
        model,
        batches,
        restoration_loss,
        args.estimator,
        end_state=end_state,
        settings=args.estimator_settings(),
        accelerator=accelerator,
        progress=True,
    )
    return replace(contributions, source=contributions_source(args))


def contributions_source(args: TaskArguments) -> dict[str, str | int | float]:
    """What the contributions are of, for their file: network, data, and the settings that choose the batches."""
    if args.dataset_name is not None:
        data = {"dataset_name": args.dataset_name}
    else:
        data = {"train_dir": args.train_dir or "shipped underwater photos"}
    return {
        "model_name_or_path": args.model_name_or_path,
        **data,
        "resolution": args.resolution,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "seed": args.seed,
        "probe_batches": args.probe_batches,
    }


def report_allocation(
    model: torch.nn.Module, ranks: dict[str, int], contributions: ContributionScores | None, output_dir: Path
) -> None:
    """Print, draw and keep which layer of the bare network got which score and rank."""
    shapes = {name: weight_matrix_shape(layer) for name, layer in adaptable_layers(model).items()}
    ranks = {name: ranks.get(name, 0) for name in shapes}
    scores = contributions.scores if contributions else None
    print(f"\n{format_allocation_table(scores, ranks, shapes)}\n")
    plot_contributions(scores, ranks, shapes, output_dir / FIGURE_FILE)
    if contributions is not None:
        contributions.save(output_dir / CONTRIBUTIONS_FILE)
