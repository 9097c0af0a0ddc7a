"""Adapt a pre-trained restoration network to pairs of real photos.

    accelerate launch examples/finetune.py

adapts the shipped network to the shipped underwater photos. For your own photos:

    accelerate launch examples/finetune.py --train_dir my/train --eval_dir my/test --output_dir outputs/mine

where each folder holds `input/` and `target/` with the same file names.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from peft import PeftModel
from transformers import AutoModelForImageToImage, HfArgumentParser

import colora_peft.models  # noqa: F401 - registers the backbones
from colora_peft import (
    CoLoRAConfig,
    ContributionScores,
    ProbeSettings,
    adaptable_layers,
    probe,
    weight_matrix_shape,
)
from colora_peft.cards import RunFacts, adapted_card, hardware_name
from colora_peft.evaluation import evaluate, restore_some
from colora_peft.figures import plot_contributions, save_before_after
from colora_peft.files import relative_path, write_json, write_text
from colora_peft.metrics import SSIM_WINDOW_PX
from colora_peft.pairs import PairedHubDataset, PairedImageFolder, PairSource, check_pairs, draw_pairs
from colora_peft.patches import PairedPatches
from colora_peft.report import format_allocation_table
from colora_peft.run_folder import check_output_dir, create_output_dir
from colora_peft.train_arguments import TrainArguments
from colora_peft.training import TrainingDiverged, restoration_loss, train, use_all_cores
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
        default=relative_path(HERE / "checkpoints" / "nafnet-small-prod"),
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
        if self.dataset_name is not None and (self.train_dir or self.eval_dir):
            raise ValueError("--dataset_name and --train_dir or --eval_dir exclude each other; give one.")
        if self.eval_dir is not None and self.train_dir is None:
            raise ValueError("--eval_dir needs --train_dir; for the shipped photos give neither.")
        for name in ("probe_steps", "probe_batches"):
            self._check_at_least(name, 1)
        super().__post_init__()
        self.adapter_config()  # refuses a wrong budget before anything is loaded

    def adapter_config(self, contributions: dict[str, float] | None = None) -> CoLoRAConfig:
        return CoLoRAConfig(contributions=contributions, parameter_budget=self.parameter_budget, beta=self.beta)


# ------------------------------------------------------------------------------------------------------------ data


def load_pairs(args: FinetuneArguments, accelerator: Accelerator) -> tuple[PairSource, PairSource]:
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
    settings = ProbeSettings(num_steps=args.probe_steps)
    return probe(model, batches, restoration_loss, settings, progress=accelerator.is_main_process)


def contributions_of(
    model: torch.nn.Module,
    patches: PairedPatches,
    args: FinetuneArguments,
    accelerator: Accelerator,
    checkpoint: Path | None,
) -> ContributionScores | None:
    """Measured by one process for all (kernels of a GPU may round differently), or read back when a run goes on."""
    if args.method != "colora":
        return None
    if checkpoint is not None:
        return ContributionScores.load(checkpoint.parent / CONTRIBUTIONS_FILE)
    measured = [measure_contributions(model, patches, args, accelerator) if accelerator.is_main_process else None]
    return broadcast_object_list(measured)[0]


# ------------------------------------------------------------------------------------------------------------- main


def main(args: FinetuneArguments) -> None:
    accelerator = Accelerator()
    use_all_cores(accelerator)
    set_seed(args.seed)
    check_figures_can_be_drawn()
    checkpoint = check_output_dir(args)
    train_pairs, eval_pairs = load_pairs(args, accelerator)
    patches = PairedPatches(train_pairs, args.resolution, args.seed)
    # float32 whatever the checkpoint stores: adapters are trained on full precision weights.
    model = AutoModelForImageToImage.from_pretrained(args.model_name_or_path, dtype=torch.float32)
    model.to(accelerator.device, memory_format=torch.channels_last)
    accelerator.print(f"{len(train_pairs)} pairs to train on, {len(eval_pairs)} to evaluate on, method {args.method}.")
    shown = accelerator.is_main_process
    before = evaluate(model, eval_pairs, accelerator.device, "before" if shown else "")
    accelerator.print(quality_line("input", before["psnr_input"], before["ssim_input"]))
    accelerator.print(quality_line("before", before["psnr"], before["ssim"]))

    contributions = contributions_of(model, patches, args, accelerator, checkpoint)
    model = prepare_for_tuning(model, args.method, args.adapter_config(contributions and contributions.scores))
    create_output_dir(args, accelerator)
    if accelerator.is_main_process and isinstance(model, PeftModel):
        report_allocation(model, contributions, Path(args.output_dir))
    sizes = trained_parameters(model)
    accelerator.print(f"{sizes['trainable_parameters']:,} parameters are trained.")

    model, seconds = train(model, patches, args, accelerator, checkpoint)
    after = evaluate(model, eval_pairs, accelerator.device, "after" if shown else "")
    accelerator.print(quality_line("after", after["psnr"], after["ssim"]))
    if accelerator.is_main_process:
        facts = RunFacts(data_description(args), hardware_name(accelerator.device), seconds, accelerator.num_processes)
        metrics = {
            **quality_metrics(before, after),
            **sizes,
            "seconds_contributions": contributions.seconds if contributions else 0.0,
            "train_pairs": len(train_pairs),
            "eval_pairs": len(eval_pairs),
        }
        save(model, eval_pairs, metrics, facts, args)


def check_figures_can_be_drawn() -> None:
    # Now, not after the training.
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('The figures need matplotlib: pip install "colora-peft[examples]".')


def quality_metrics(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {
        f"{figure}_{name}": values[key]
        for figure in ("psnr", "ssim")
        for name, values, key in (
            ("input", before, f"{figure}_input"),
            ("before", before, figure),
            ("after", after, figure),
        )
    }


def quality_line(name: str, psnr_db: float, ssim: float) -> str:
    return f"{name:>8}: PSNR {psnr_db:.2f} dB, SSIM {ssim:.3f}"


def report_allocation(model: PeftModel, contributions: ContributionScores | None, output_dir: Path) -> None:
    """Print, draw and keep which layer got which score and rank."""
    layers = adaptable_layers(model.get_base_model())
    shapes = {name: weight_matrix_shape(layer) for name, layer in layers.items()}
    scores = contributions.scores if contributions else None
    ranks = model.peft_config["default"].ranks
    print(f"\n{format_allocation_table(scores, ranks, shapes)}\n")
    plot_contributions(scores, ranks, shapes, output_dir / "contribution.png")
    if contributions is not None:
        contributions.save(output_dir / CONTRIBUTIONS_FILE)


def save(
    model: torch.nn.Module,
    eval_pairs: PairSource,
    metrics: dict[str, object],
    facts: RunFacts,
    args: FinetuneArguments,
) -> None:
    """Write the result, its pictures, its card and last the metrics, and say how to load it."""
    output_dir = Path(args.output_dir)
    model.save_pretrained(output_dir)
    save_before_after(restore_some(model, eval_pairs, count=4), output_dir / "before_after.png")
    is_adapter = isinstance(model, PeftModel)
    snippet = loading_code(args, is_adapter)
    metrics = {
        "method": args.method,
        "seed": args.seed,
        **metrics,
        "seconds": facts.seconds,
        "learning_rate": args.learning_rate,
        "max_train_steps": args.max_train_steps,
        "hardware": facts.hardware,
        "processes": facts.processes,
        "torch": torch.__version__,
    }
    card = adapted_card(output_dir.name, args.model_name_or_path, snippet, metrics, facts, is_adapter)
    write_text(output_dir / "README.md", card)
    write_json(output_dir / "metrics.json", metrics)
    print(f"Saved in {output_dir}: the result, its card, metrics.json and pictures. Load it with:\n\n{snippet}")


def loading_code(args: FinetuneArguments, is_adapter: bool) -> str:
    """The three lines of Python that load the result."""
    base = args.model_name_or_path if is_adapter else args.output_dir
    lines = [
        "import colora_peft.models, peft, transformers" if is_adapter else "import colora_peft.models, transformers",
        f"model = transformers.AutoModelForImageToImage.from_pretrained({base!r})",
    ]
    if is_adapter:
        lines.append(f"model = peft.PeftModel.from_pretrained(model, {args.output_dir!r})")
    return "\n".join(lines)


def data_description(args: FinetuneArguments) -> str:
    if args.dataset_name is not None:
        return f"the dataset {args.dataset_name}"
    if args.train_dir is not None:
        return f"the folder {Path(args.train_dir).name}"
    return "underwater photos of LSUI from the U-shape Transformer repository (MIT)"


if __name__ == "__main__":
    try:
        (parsed,) = HfArgumentParser(FinetuneArguments).parse_args_into_dataclasses()
        main(parsed)
    except (ValueError, TypeError, OSError, ImportError, TrainingDiverged) as error:
        sys.exit(f"finetune.py: {error}")
