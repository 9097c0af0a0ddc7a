"""Adapt a pre-trained restoration network to pairs of real photos.

    accelerate launch examples/finetune.py

adapts the shipped network to the shipped underwater photos. For your own photos:

    accelerate launch examples/finetune.py --train_dir my/train --eval_dir my/test --output_dir outputs/mine

where each folder holds `input/` and `target/` with the same file names.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import PeftModel
from transformers import AutoModelForImageToImage, HfArgumentParser

import colora_peft.models  # noqa: F401 - registers the backbones
from colora_peft import CoLoRAConfig, ContributionScores, adaptable_layers, probe, weight_matrix_shape
from colora_peft.cards import hardware_name
from colora_peft.checkpoint import write_json
from colora_peft.evaluation import evaluate, restore_some
from colora_peft.figures import plot_contributions, save_before_after
from colora_peft.pairs import PairedHubDataset, PairedImageFolder, PairSource, check_pairs, draw_pairs
from colora_peft.patches import PairedPatches
from colora_peft.report import format_allocation_table
from colora_peft.training import (
    TrainArguments,
    TrainingDiverged,
    prepare_output_dir,
    restoration_loss,
    train,
    use_all_cores,
)
from colora_peft.tuning import LEARNING_RATES, Method, prepare_for_tuning, trained_parameters

HERE = Path(__file__).parent
CONTRIBUTIONS_FILE = "contributions.json"


@dataclass
class FinetuneArguments(TrainArguments):
    """Flags of the fine-tuning."""

    output_dir: str = field(default="outputs/finetune", metadata={"help": "Folder for checkpoints and the result."})
    max_train_steps: int = field(default=500, metadata={"help": "Optimiser steps of the whole run."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Patches a step on each process."})
    resolution: int = field(default=128, metadata={"help": "Side of the square training patches in pixels."})
    learning_rate: float | None = field(
        default=None, metadata={"help": f"Peak learning rate of AdamW. Default by method: {dict(LEARNING_RATES)}."}
    )
    model_name_or_path: str = field(
        default=str(HERE / "checkpoints" / "nafnet-small-prod"),
        metadata={"help": "The pre-trained network: a folder or an id on the Hub."},
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
    method: Method = field(
        default="colora",
        metadata={"help": "colora: ranks by contribution; lora: the same budget, uniform; full, decoder, bias: train "
                  "these parameters of the network itself."},
    )  # fmt: skip
    parameter_budget: float = field(
        default=0.07, metadata={"help": "Trained share of the adapted weights, in (0, 1] (colora and lora)."}
    )
    beta: float = field(default=CoLoRAConfig.beta, metadata={"help": "From contribution to rank: 0 is uniform."})
    probe_steps: int = field(
        default=50, metadata={"help": "Steps of the short full tuning that measures the contributions (colora)."}
    )
    probe_batches: int = field(
        default=4, metadata={"help": "Batches on which the contributions are measured (colora)."}
    )

    def __post_init__(self) -> None:
        if self.learning_rate is None:
            self.learning_rate = LEARNING_RATES[self.method]
        if self.eval_dir is not None and self.train_dir is None:
            raise ValueError("--eval_dir needs --train_dir; for the shipped photos give neither.")
        if self.dataset_name is not None and self.train_dir is not None:
            raise ValueError("--dataset_name and --train_dir exclude each other; give one.")
        super().__post_init__()
        self.adapter_config()  # refuses a wrong budget before anything is loaded

    def adapter_config(self, contributions: dict[str, float] | None = None) -> CoLoRAConfig:
        return CoLoRAConfig(contributions=contributions, parameter_budget=self.parameter_budget, beta=self.beta)


# ------------------------------------------------------------------------------------------------------------ data


def load_pairs(args: FinetuneArguments) -> tuple[PairSource, PairSource]:
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
        print(f"No evaluation pairs were given: {len(eval_pairs)} are held out ({', '.join(eval_pairs.names)}).")
    if args.max_train_samples is not None:
        train_pairs, _ = draw_pairs(train_pairs, args.max_train_samples, args.seed)
    check_pairs(train_pairs, args.resolution)
    check_pairs(eval_pairs, 1)
    return train_pairs, eval_pairs


def load_hub_pairs(args: FinetuneArguments) -> tuple[PairSource, PairSource | None]:
    from datasets import load_dataset

    splits = load_dataset(args.dataset_name, args.dataset_config_name)
    if "train" not in splits:
        raise ValueError(f"{args.dataset_name} has the splits {sorted(splits)}; one must be called train.")
    held_out = next((splits[name] for name in ("test", "validation") if name in splits), None)
    return PairedHubDataset(splits["train"]), None if held_out is None else PairedHubDataset(held_out)


# ---------------------------------------------------------------------------------------------------- contributions


def measure_contributions(
    model: torch.nn.Module, patches: PairedPatches, args: FinetuneArguments, accelerator: Accelerator
) -> ContributionScores:
    """Score the layers on the first patches of the run by a short full tuning."""
    size = args.per_device_train_batch_size
    samples = [patches[number] for number in range(args.probe_batches * size)]
    batches = [
        {key: torch.stack([sample[key] for sample in samples[first : first + size]]).to(accelerator.device)
         for key in samples[0]}
        for first in range(0, len(samples), size)
    ]  # fmt: skip
    return probe(model, batches, restoration_loss, num_steps=args.probe_steps, progress=accelerator.is_main_process)


def contributions_of(
    model: torch.nn.Module, patches: PairedPatches, args: FinetuneArguments, accelerator: Accelerator, resumed: bool
) -> ContributionScores:
    """Measured on every process alike (same patches, same seed), or read back when a run goes on."""
    path = Path(args.output_dir) / CONTRIBUTIONS_FILE
    if resumed:
        return ContributionScores.load(path)
    contributions = measure_contributions(model, patches, args, accelerator)
    if accelerator.is_main_process:
        contributions.save(path)
    return contributions


# ------------------------------------------------------------------------------------------------------------- main


def main(args: FinetuneArguments) -> None:
    accelerator = Accelerator()
    use_all_cores(accelerator)
    set_seed(args.seed)
    train_pairs, eval_pairs = load_pairs(args)
    patches = PairedPatches(train_pairs, args.resolution, args.seed)
    # float32 whatever the checkpoint stores: adapters are trained on full precision weights.
    model = AutoModelForImageToImage.from_pretrained(args.model_name_or_path, dtype=torch.float32)
    model.to(accelerator.device, memory_format=torch.channels_last)
    checkpoint = prepare_output_dir(args, accelerator)
    if accelerator.is_main_process:
        print(f"{len(train_pairs)} pairs to train on, {len(eval_pairs)} to evaluate on, method {args.method}.")
    before = evaluate(model, eval_pairs, accelerator.device, "before")
    print_quality(accelerator, "input", before["psnr_input"], before["ssim_input"])
    print_quality(accelerator, "before", before["psnr"], before["ssim"])

    contributions = None
    if args.method == "colora":
        contributions = contributions_of(model, patches, args, accelerator, checkpoint is not None)
    shapes = {name: weight_matrix_shape(layer) for name, layer in adaptable_layers(model).items()}
    config = args.adapter_config(contributions.scores if contributions else None)
    model = prepare_for_tuning(model, args.method, config)
    sizes = trained_parameters(model)
    if accelerator.is_main_process:
        print(
            f"{sizes['trainable_parameters']:,} parameters are trained, {sizes['trainable_ratio']:.2%} of the weights."
        )

    model, seconds = train(model, patches, args, accelerator, checkpoint)
    after = evaluate(model, eval_pairs, accelerator.device, "after")
    print_quality(accelerator, "after", after["psnr"], after["ssim"])
    if accelerator.is_main_process:
        metrics = {
            "method": args.method,
            "seed": args.seed,
            "psnr_input": before["psnr_input"],
            "psnr_before": before["psnr"],
            "psnr_after": after["psnr"],
            "ssim_input": before["ssim_input"],
            "ssim_before": before["ssim"],
            "ssim_after": after["ssim"],
            **sizes,
            "seconds": seconds,
            "seconds_contributions": contributions.seconds if contributions else 0.0,
            "train_pairs": len(train_pairs),
            "eval_pairs": len(eval_pairs),
            "learning_rate": args.learning_rate,
            "max_train_steps": args.max_train_steps,
            "hardware": hardware_name(accelerator.device),
            "torch": torch.__version__,
        }
        save(model, eval_pairs, contributions, shapes, metrics, args)


def print_quality(accelerator: Accelerator, name: str, psnr_db: float, ssim: float) -> None:
    if accelerator.is_main_process:
        print(f"{name:>8}: PSNR {psnr_db:.2f} dB, SSIM {ssim:.3f}")


def save(
    model: torch.nn.Module,
    eval_pairs: PairSource,
    contributions: ContributionScores | None,
    shapes: dict[str, tuple[int, int]],
    metrics: dict[str, object],
    args: FinetuneArguments,
) -> None:
    """Write the result, the figures and last the metrics, and say how to load it."""
    output_dir = Path(args.output_dir)
    model.save_pretrained(output_dir)
    is_adapter = isinstance(model, PeftModel)
    if is_adapter:
        ranks = model.peft_config["default"].ranks
        scores = contributions.scores if contributions else None
        print(f"\n{format_allocation_table(scores, ranks, shapes)}\n")
        plot_contributions(scores, ranks, shapes, output_dir / "contribution.png")
    save_before_after(restore_some(model, eval_pairs, count=4), output_dir / "before_after.png")
    write_json(output_dir / "metrics.json", metrics)
    print(f"Saved in {output_dir}: the result, metrics.json and before_after.png. Load it with:\n")
    print("import colora_peft.models, peft, transformers")
    base = args.model_name_or_path if is_adapter else args.output_dir
    print(f'model = transformers.AutoModelForImageToImage.from_pretrained("{base}")')
    if is_adapter:
        print(f'model = peft.PeftModel.from_pretrained(model, "{output_dir}")')


if __name__ == "__main__":
    try:
        (parsed,) = HfArgumentParser(FinetuneArguments).parse_args_into_dataclasses()
        main(parsed)
    except (ValueError, FileNotFoundError, TrainingDiverged) as error:
        sys.exit(f"finetune.py: {error}")
