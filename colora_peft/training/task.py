"""A task of `finetune.py` and `contribution.py`: its network, its pairs, and what each layer contributes to it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import default_collate

from colora_peft.contribution import Estimator, FaigSettings, ProbeSettings, estimate_contributions
from colora_peft.data import (
    PairedHubDataset,
    PairedImageFolder,
    PairedPatches,
    PairSource,
    check_pairs,
    count_in_words,
    draw_pairs,
    hold_out_pairs,
    note_on_profiles,
)
from colora_peft.evaluation import SSIM_WINDOW_PX
from colora_peft.hub import load_backbone
from colora_peft.inference import restoration_loss
from colora_peft.ranks import (
    ContributionScores,
    adaptable_layers,
    check_same_names,
    format_allocation_table,
    left_out,
    plot_contributions,
    weight_matrix_shape,
)
from colora_peft.tuner import CoLoRAConfig
from colora_peft.utils import check_at_least, check_seed, flag

from .arguments import OnResume
from .network_checks import check_takes_images

CONTRIBUTIONS_FILE = "contributions.json"
FIGURE_FILE = "contribution.png"


@dataclass
class TaskArguments:
    """Flags of every script that looks at a task's pairs with a pre-trained network."""

    model_name_or_path: Annotated[str, OnResume.INPUT] = flag(
        help="The pre-trained network: a folder, an id on the Hub, or module:function."
    )
    train_dir: Annotated[str | None, OnResume.DATA, OnResume.INPUT] = flag(
        None, "Path to a folder with input/ and target/. Default: the shipped underwater photos."
    )
    eval_dir: Annotated[str | None, OnResume.FREE, OnResume.INPUT] = flag(
        None, "Path to such a folder for evaluation. With --train_dir alone, a fifth of its pairs is held out."
    )
    input_pattern: Annotated[str, OnResume.DATA] = flag(
        "{}",
        "Names of the inputs without suffix, such as '{}_noisy': {} is what both names of a pair share, * what does "
        "not count. With *, as in '{}_*', a target may have several inputs. Pairs may then lie side by side, too.",
    )
    target_pattern: Annotated[str, OnResume.DATA] = flag("{}", "Names of the targets, such as '{}_clean'.")
    dataset_name: Annotated[str | None, OnResume.DATA, OnResume.INPUT] = flag(
        None,
        "Instead of folders: a Hugging Face dataset (Hub id or folder) with the image columns input and target; its "
        "test or validation split is for evaluation.",
    )
    dataset_config_name: Annotated[str | None, OnResume.DATA] = flag(None, "Name of that dataset's configuration.")
    max_train_samples: int | None = flag(None, "Number of pairs to train on, drawn by the seed. Default: all.")
    resolution: int = flag(128, "Side of the square training patches in pixels.")
    per_device_train_batch_size: Annotated[int, OnResume.FREE] = flag(
        4, "Number of patches in a batch of each process."
    )
    seed: int = flag(0, "Seed of everything random; on one CPU set-up it fixes the result bitwise.")
    parameter_budget: float = flag(0.07, "Trained share of the adapted weights, in (0, 1] (colora and lora).")
    beta: float = flag(CoLoRAConfig.beta, "Exponent from contribution to rank: 0 gives all layers the same.")
    estimator: Estimator = flag(
        "gradient",
        "How contributions are measured. gradient, fisher, taylor: one pass, no tuning; probe: tune for --probe_steps "
        "and walk there; faig: walk to the weights of a fully tuned network.",
    )
    probe_steps: int = flag(
        ProbeSettings.num_steps,
        "Number of steps of the short full tuning that measures the contributions (--estimator probe).",
    )
    probe_batches: int = flag(4, "Number of batches on which the contributions are measured.")

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


def load_network(args: TaskArguments, accelerator: Accelerator) -> nn.Module:
    """The task's network on the accelerator's device.

    Raises:
        OSError, ValueError, TypeError: It is not there, or does not restore RGB images.
    """
    network = load_backbone(args.model_name_or_path).to(accelerator.device, memory_format=torch.channels_last)
    check_takes_images(network, args.model_name_or_path, args.resolution)
    return network


def load_pairs(
    args: TaskArguments, accelerator: Accelerator, default_dir: str | Path
) -> tuple[PairSource, PairSource]:
    """The pairs to train on and the pairs to evaluate on, all checked.

    Args:
        args: The task's.
        accelerator: Its main process says which pairs are held out.
        default_dir: Folder with train/ and test/, where `args` name no data.
    """
    eval_pairs = None
    if args.train_dir is None and (args.input_pattern, args.target_pattern) != ("{}", "{}"):
        raise ValueError("--input_pattern and --target_pattern have no effect without --train_dir: add it.")
    if args.dataset_name is not None:
        train_pairs, eval_pairs = _load_hub_pairs(args)
    elif args.train_dir is None:
        train_pairs, eval_pairs = (PairedImageFolder(Path(default_dir) / side) for side in ("train", "test"))
    else:
        train_pairs = open_pairs(args, args.train_dir, accelerator)
        eval_pairs = open_pairs(args, args.eval_dir, accelerator) if args.eval_dir is not None else None
    if eval_pairs is None:
        eval_pairs, train_pairs = hold_out_pairs(train_pairs, one_in=5, seed=args.seed)
        names = ", ".join(eval_pairs.names)
        accelerator.print(
            f"No evaluation pairs were given: {len(eval_pairs)} of those to train on "
            f"{'is' if len(eval_pairs) == 1 else 'are'} held out ({names})."
        )
    if args.max_train_samples is not None:
        train_pairs, _ = draw_pairs(train_pairs, args.max_train_samples, args.seed)
    check_pairs(train_pairs, args.resolution, "the training patch: lower --resolution or remove the pair")
    check_pairs(eval_pairs, SSIM_WINDOW_PX, "SSIM's window: remove the pair")
    for note in filter(None, map(note_on_profiles, (train_pairs, eval_pairs))):
        accelerator.print(note)
    return train_pairs, eval_pairs


def check_targets_differ(pairs: PairSource) -> None:
    """Refuses pairs whose inputs are copies of their targets, all of them; it reads no further than the first other.

    Raises:
        ValueError: They are.
    """
    if all(torch.equal(*pairs[index]) for index in range(len(pairs))):
        raise ValueError("The inputs of the pairs to train on are equal to their targets: there is nothing to learn.")


def open_pairs(args: TaskArguments, folder: str | Path, accelerator: Accelerator) -> PairedImageFolder:
    """The pairs in a folder by the patterns of `args`; says if targets have several inputs, or files are left out."""
    pairs = PairedImageFolder(folder, args.input_pattern, args.target_pattern)
    if len(set(pairs.scenes)) < len(pairs):
        accelerator.print(f"{folder}: {count_in_words(pairs)}.")
    if pairs.left_out:
        accelerator.print(f"{folder}: {pairs.left_out}")
    return pairs


def _load_hub_pairs(args: TaskArguments) -> tuple[PairSource, PairSource | None]:
    """The pairs of --dataset_name to train on, and those to evaluate on if it has such a split."""
    from datasets import load_dataset

    splits = load_dataset(args.dataset_name, args.dataset_config_name)
    if "train" not in splits:
        raise ValueError(f"{args.dataset_name} has the splits {sorted(splits)}; one must be called train.")
    held_out = next((splits[name] for name in ("test", "validation") if name in splits), None)
    return PairedHubDataset(splits["train"]), None if held_out is None else PairedHubDataset(held_out)


# ---------------------------------------------------------------------------------------------------- contributions


def measure_contributions(
    model: nn.Module,
    patches: PairedPatches,
    args: TaskArguments,
    accelerator: Accelerator,
    end_state: dict[str, Tensor] | None = None,
) -> ContributionScores:
    """The layers' scores on the first patches of the run, which the processes share out."""
    size = args.per_device_train_batch_size
    samples = [patches[number] for number in range(args.probe_batches * size)]
    batches = [
        send_to_device(default_collate(samples[first : first + size]), accelerator.device)
        for first in range(0, len(samples), size)
    ]
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
    return replace(contributions, source=source_of(args))


def load_contributions(file: str | Path, model: nn.Module, name_or_path: str) -> ContributionScores:
    """Contributions from a file, for the network of this name.

    The names of the layers must be those of the network. Nothing else is compared, but `note_on_source` points out a
    network of another name: to transfer scores to it may be intended.

    Raises:
        ValueError: The file cannot be used, or its layers have other names than those of the network.
    """
    contributions = ContributionScores.load(file)
    try:
        check_same_names(contributions.scores, adaptable_layers(model), "contributions")
    except ValueError as error:
        raise ValueError(
            f"The contributions in '{file}' are of another network than {name_or_path}. {error} "
            "Measure them again with contribution.py."
        ) from error
    return contributions


def note_on_source(contributions: ContributionScores | None, name_or_path: str) -> str | None:
    """A note that the contributions were measured on another network; None if they were not, or nobody noted it."""
    source = {} if contributions is None else contributions.source
    measured_on = source.get("model_name_or_path", name_or_path)
    if measured_on == name_or_path:
        return None
    return f"Note: the contributions were measured on {measured_on}, this run adapts {name_or_path}."


def source_of(args: TaskArguments) -> dict[str, str | int | float]:
    """Origin of the contributions, for their file: network, data, and the settings that choose the batches."""
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
    model: nn.Module, ranks: dict[str, int], contributions: ContributionScores | None, output_dir: Path
) -> None:
    """Prints, draws and keeps the score and the rank of each layer of the bare network."""
    shapes = {name: weight_matrix_shape(layer) for name, layer in adaptable_layers(model).items()}
    ranks = {name: ranks.get(name, 0) for name in shapes}
    scores = contributions.scores if contributions else None
    table = [format_allocation_table(scores, ranks, shapes), *left_out(model)]
    print("\n" + "\n".join(table) + "\n")
    plot_contributions(scores, ranks, shapes, output_dir / FIGURE_FILE)
    if contributions is not None:
        contributions.save(output_dir / CONTRIBUTIONS_FILE)
