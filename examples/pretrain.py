"""Pre-train a restoration network on clean pictures with PROD (random order degradations).

    accelerate launch examples/pretrain.py --train_dir path/to/clean/photos --output_dir outputs/nafnet-small-prod
    accelerate launch examples/pretrain.py --dataset_name you/photos --streaming --max_train_steps 500000

The output folder then is what `AutoModelForImageToImage.from_pretrained` takes (after `import colora_peft.models`).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageToImage, HfArgumentParser

import colora_peft.models  # noqa: F401 - registers the backbones
from colora_peft.backbones import load_backbone
from colora_peft.cards import RunFacts, backbone_card, hardware_name, loading_code
from colora_peft.config import PRIOR_CONTRIBUTIONS
from colora_peft.corpus import HubPictures, ImageFiles, PictureSource, check_pictures
from colora_peft.figures import check_figures_can_be_drawn
from colora_peft.files import relative_path, write_text, writing_result
from colora_peft.hub import create_hub_repo, push_folder
from colora_peft.images import list_images
from colora_peft.metrics import SSIM_WINDOW_PX
from colora_peft.patches import DegradedPatches, DegradedPictures
from colora_peft.processes import Processes
from colora_peft.prod import RandomOrderDegradation
from colora_peft.run_folder import check_output_dir, open_output_dir
from colora_peft.streams import PictureStream, StreamPatches
from colora_peft.trackers import create_accelerator
from colora_peft.train_arguments import TrainArguments, check_at_least
from colora_peft.training import DataFailed, TrainingDiverged, train, use_all_cores

MOST_CHECKED = 5_000  # pictures; to decode so many photos takes a minute or two
SMALL_NAFNET = relative_path(Path(__file__).parent / "checkpoints" / "nafnet-small-prod")


@dataclass
class PretrainArguments(TrainArguments):
    """Flags of the pre-training."""

    output_dir: str = field(default="outputs/pretrain", metadata={"help": "Folder for checkpoints and the result."})
    max_train_steps: int = field(default=36_000, metadata={"help": "Optimiser steps of the whole run."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Patches a step on each process."})
    resolution: int = field(default=64, metadata={"help": "Side of the square training patches in pixels."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of AdamW; it falls to zero."})
    lr_warmup_steps: int = field(default=500, metadata={"help": "Steps over which the learning rate rises."})
    checkpointing_steps: int = field(default=2_000, metadata={"help": "Steps between checkpoints."})
    train_dir: str | None = field(
        default=None, metadata={"help": "Folder of clean pictures, those in folders below it included."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Instead of --train_dir a Hugging Face dataset: on the Hub, a local folder of parquet files "
                  "or the like, or one .parquet file. Its train split is used."},
    )  # fmt: skip
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    image_column: str = field(default="image", metadata={"help": "Its column of clean pictures."})
    streaming: bool = field(
        default=False, metadata={"help": "Read that dataset as it comes, without a copy on the disk or in memory."}
    )
    shuffle_block_size: int = field(
        default=1_000, metadata={"help": "Pictures of a stream that each process holds and shuffles at a time."}
    )
    check_pictures: Literal["auto", "always", "never"] = field(
        default="auto",
        metadata={"help": "Decode every picture before the run and refuse bad ones; auto: up to "
                  f"{MOST_CHECKED:,} pictures. Bad ones met later are replaced and listed in skipped_pictures.jsonl."},
    )  # fmt: skip
    max_skipped_share: float = field(
        default=0.01,
        metadata={
            "help": "Stop where more than this share of the samples met a bad picture (skipped_pictures.jsonl)."
        },
    )
    eval_dir: str | None = field(
        default=None, metadata={"help": "Folder of other clean pictures, for --validation_steps."}
    )
    mode: Literal["prod", "single", "fixed"] = field(
        default="prod",
        metadata={"help": "prod: random subsets in random order; single: one at a time; fixed: all, in one order."},
    )
    untouched_share: float = field(
        default=0.0,
        metadata={"help": "Share of the patches left as they are: the network learns to spare good photos."},
    )
    light_share: float = field(
        default=0.0, metadata={"help": "Share of the patches degraded lightly, as a good camera does."}
    )
    enlarged_share: float = field(
        default=0.0,
        metadata={"help": "Share of the patches that are enlarged with their targets: the network learns that photos "
                  "may be soft, and does not sharpen them."},
    )  # fmt: skip
    config_name: str = field(
        default=SMALL_NAFNET, metadata={"help": "Folder or Hub id with the network's config.json; new weights."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Go on from these weights instead of new ones (then --config_name is unused)."}
    )
    half_precision_weights: bool = field(
        default=False, metadata={"help": "Store the result's weights as float16, half the size; it loads as float32."}
    )
    data_card: str = field(
        default="unknown", metadata={"help": "What the pictures are and their licence, for the model card."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.train_dir is None) == (self.dataset_name is None):
            raise ValueError("Give --train_dir, a folder of clean pictures, or --dataset_name, and not both.")
        if self.streaming and self.dataset_name is None:
            raise ValueError("--streaming needs --dataset_name; a folder is read picture by picture anyway.")
        if self.streaming and self.check_pictures == "always":
            raise ValueError("--check_pictures always and --streaming exclude each other: a stream has no way back.")
        check_at_least(self, "shuffle_block_size", 1)
        if not 0 <= self.max_skipped_share <= 1:
            raise ValueError(f"--max_skipped_share must be between 0 and 1, got {self.max_skipped_share}.")
        if not 0 <= self.enlarged_share <= 1:
            raise ValueError(f"--enlarged_share must be between 0 and 1, got {self.enlarged_share}.")
        self.degradation()  # refuses wrong shares before anything is loaded
        if (self.eval_dir is None) != (self.validation_steps == 0):
            raise ValueError("--validation_steps and --eval_dir need each other: give both or none.")
        if self.validation_steps:
            check_at_least(self, "resolution", SSIM_WINDOW_PX)

    def degradation(self) -> RandomOrderDegradation:
        return RandomOrderDegradation(
            mode=self.mode, untouched_share=self.untouched_share, light_share=self.light_share
        )


def build_model(args: PretrainArguments) -> torch.nn.Module:
    """The network to train: of other weights, or new.

    Raises:
        ValueError: it cannot be saved, or cannot be loaded.
    """
    if args.model_name_or_path is not None:
        model = load_backbone(args.model_name_or_path)
        if not hasattr(model, "save_pretrained"):
            raise ValueError(f"{args.model_name_or_path} has no save_pretrained, by which the result would be saved.")
    else:
        model = AutoModelForImageToImage.from_config(AutoConfig.from_pretrained(args.config_name))
    if hasattr(model.config, PRIOR_CONTRIBUTIONS):  # those of the network as it was
        delattr(model.config, PRIOR_CONTRIBUTIONS)
    return model


def open_pictures(args: PretrainArguments) -> PictureSource:
    """The clean pictures by index, checked where that does not take long."""
    if args.train_dir is None:
        pictures: PictureSource = HubPictures(open_split(args), args.image_column)
    else:
        pictures = ImageFiles(list_images(args.train_dir, nested=True))
        if len(pictures) > MOST_CHECKED:  # of so many, hardly one is met again before the memory is full
            pictures = ImageFiles(pictures.paths, cache_bytes=0)
    if args.check_pictures == "always" or (args.check_pictures == "auto" and len(pictures) <= MOST_CHECKED):
        check_pictures(pictures, args.resolution)
    return pictures


def open_split(args: PretrainArguments) -> Any:
    """The train split of --dataset_name."""
    from datasets import load_dataset

    name, config, data_files = args.dataset_name, args.dataset_config_name, None
    if name.endswith(".parquet"):
        name, data_files = "parquet", name
    splits = load_dataset(name, config, data_files=data_files, streaming=args.streaming)
    if "train" not in splits:
        raise ValueError(f"{args.dataset_name} has the splits {sorted(splits)}; one must be called train.")
    return splits["train"]


def open_patches(args: PretrainArguments, accelerator: Accelerator) -> DegradedPatches | StreamPatches:
    """The training samples, and what was found wrong before any is made."""
    degradation, shares = args.degradation(), (args.max_skipped_share, args.enlarged_share)
    if not args.streaming:
        pictures = open_pictures(args)
        return DegradedPatches(pictures, degradation, args.resolution, args.seed, *shares)
    stream = PictureStream(open_split(args), args.image_column, args.seed, args.shuffle_block_size)
    with Processes(accelerator).failing_together():
        stream.check(args.resolution, accelerator.process_index, accelerator.num_processes)
    return StreamPatches(stream, degradation, args.resolution, *shares)


def main(args: PretrainArguments) -> None:
    accelerator = create_accelerator(args)
    use_all_cores(accelerator)
    set_seed(args.seed)
    checkpoint = check_output_dir(args)
    patches = open_patches(args, accelerator)
    eval_pairs = None
    if args.eval_dir is not None:
        check_figures_can_be_drawn()
        eval_pictures = ImageFiles(list_images(args.eval_dir, nested=True))
        check_pictures(eval_pictures, args.resolution)
        eval_pairs = DegradedPictures(eval_pictures, patches.degradation, args.resolution)
    model = build_model(args)
    if args.push_to_hub and accelerator.is_main_process:  # before the work: what the Hub refuses, it refuses now
        args.hub_model_id = create_hub_repo(
            args.hub_model_id or Path(args.output_dir).resolve().name, private=args.hub_private_repo or None
        )
    with open_output_dir(args, accelerator, checkpoint):
        model, seconds = train(model, patches, args, accelerator, checkpoint, eval_pairs)
        if accelerator.is_main_process:
            facts = RunFacts(
                args.data_card,
                hardware_name(accelerator.device),
                seconds,
                accelerator.num_processes,
                mixed_precision=accelerator.mixed_precision,
            )
            save(model, args, facts, patches.fingerprint.partition(",")[0])


def save(model: torch.nn.Module, args: PretrainArguments, facts: RunFacts, pictures: str) -> None:
    """Write the network and its card into the output folder, and push them if asked to."""
    dtype = torch.float16 if args.half_precision_weights else torch.float32
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * facts.processes
    began = "" if args.model_name_or_path is None else f", beginning with the weights of {args.model_name_or_path}"
    averaged = f", weights averaged with decay {args.ema_decay}" if args.use_ema else ""
    method = (
        f"Pre-trained to undo synthetic degradations (blur, noise, rain, JPEG, motion; mode `{args.mode}`, see "
        f"arXiv 2408.01099) on {pictures}: {args.max_train_steps} steps of {batch} patches of "
        f"{args.resolution}x{args.resolution}, seed {args.seed}{began}{averaged}."
    )
    loads_from = args.hub_model_id if args.push_to_hub else args.output_dir
    card = backbone_card(model, Path(args.output_dir).resolve().name, loads_from, method, facts)
    with writing_result(args.output_dir):
        # The model itself stays float32, so its config says float32 and that is how it loads.
        weights = {name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}
        model.save_pretrained(args.output_dir, state_dict=weights)
        write_text(Path(args.output_dir) / "README.md", card)
    print(f"\nSaved in {args.output_dir}.")
    if args.push_to_hub:
        print(f"Pushed to {args.hub_model_id}, commit {push_folder(args.output_dir, args.hub_model_id)}.")
    print(f"Load it with:\n\n{loading_code(loads_from)}")


if __name__ == "__main__":
    try:
        (parsed,) = HfArgumentParser(PretrainArguments).parse_args_into_dataclasses()
        main(parsed)
    except (ValueError, TypeError, OSError, ImportError, SafetensorError, TrainingDiverged, DataFailed) as error:
        sys.exit(f"pretrain.py: {error}")
