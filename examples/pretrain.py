"""Pre-trains a restoration network on clean images with PROD (random order degradations).

    accelerate launch examples/pretrain.py --train_dir path/to/clean/photos --output_dir outputs/nafnet-small-prod
    accelerate launch examples/pretrain.py --dataset_name you/photos --streaming --max_train_steps 500000

The output folder then is what `AutoModelForImageToImage.from_pretrained` takes (after `import colora_peft.models`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import AutoConfig, AutoModelForImageToImage

import colora_peft.models  # noqa: F401 - registers the backbones
from colora_peft.data import (
    DegradedImages,
    DegradedPatches,
    HubImages,
    ImageFiles,
    ImageSource,
    ImageStream,
    StreamPatches,
    check_images,
)
from colora_peft.evaluation import SSIM_WINDOW_PX
from colora_peft.hub import (
    RunFacts,
    backbone_card,
    best_step,
    create_hub_repo,
    hardware_name,
    load_backbone,
    loading_code,
    push_folder,
)
from colora_peft.images import left_out_in_words, list_images
from colora_peft.prod import RandomOrderDegradation
from colora_peft.training import (
    BEST_FOLDER,
    DataFailed,
    OnResume,
    TrainArguments,
    TrainingDiverged,
    check_output_dir,
    check_result_is_finite,
    check_takes_images,
    create_accelerator,
    open_output_dir,
    prolonged_in_words,
    read_best,
    train,
    use_all_cores,
)
from colora_peft.tuner import PRIOR_CONTRIBUTIONS
from colora_peft.utils import Processes, check_at_least, flag, relative_path, run_script, write_text, writing_result

MOST_CHECKED = 5_000  # images; decoding so many takes a minute or two
SMALL_NAFNET = relative_path(Path(__file__).parent / "checkpoints" / "nafnet-small-prod")


@dataclass
class PretrainArguments(TrainArguments):
    """Flags of the pre-training."""

    output_dir: str = flag("outputs/pretrain", "Path to the folder for checkpoints and the result.")
    max_train_steps: int = flag(36_000, "Number of optimiser steps of the whole run.")
    per_device_train_batch_size: int = flag(8, "Number of patches in a batch of each process.")
    resolution: int = flag(64, "Side of the square training patches in pixels.")
    learning_rate: float = flag(1e-3, "Peak learning rate of AdamW; it falls to zero along a cosine.")
    lr_warmup_steps: int = flag(500, "Number of steps over which the learning rate rises from zero.")
    checkpointing_steps: int = flag(2_000, "Number of steps between checkpoints.")
    train_dir: Annotated[str | None, OnResume.DATA, OnResume.INPUT] = flag(
        None, "Path to a folder of clean images; those in folders below it count, too."
    )
    dataset_name: Annotated[str | None, OnResume.DATA, OnResume.INPUT] = flag(
        None,
        "Instead of --train_dir a Hugging Face dataset: on the Hub, a local folder of parquet files or the like, or "
        "one .parquet file. Its train split is used.",
    )
    dataset_config_name: Annotated[str | None, OnResume.DATA] = flag(None, "Name of that dataset's configuration.")
    image_column: Annotated[str, OnResume.DATA] = flag("image", "Name of that dataset's column of clean images.")
    streaming: bool = flag(False, "Read that dataset as it comes, without a copy on the disk or in memory.")
    shuffle_block_size: int = flag(
        1_000, "Number of images of a stream that each process holds and shuffles at a time."
    )
    check_pictures: Annotated[Literal["auto", "always", "never"], OnResume.FREE] = flag(
        "auto",
        f"Decode every image before the run and refuse bad ones; auto: up to {MOST_CHECKED:,} images. Bad ones met "
        "later are replaced and listed in skipped_pictures.jsonl.",
    )
    max_skipped_share: Annotated[float, OnResume.FREE] = flag(
        0.01, "Largest share of samples that may meet a bad image (skipped_pictures.jsonl); the run stops above it."
    )
    eval_dir: Annotated[str | None, OnResume.FREE, OnResume.INPUT] = flag(
        None, "Path to a folder of other clean images, for --validation_steps."
    )
    mode: Literal["prod", "single", "fixed"] = flag(
        "prod", "prod: random subsets in random order; single: one at a time; fixed: all, in one order."
    )
    untouched_share: float = flag(
        0.0, "Share of the patches left as they are: the network learns to spare good images."
    )
    light_share: float = flag(0.0, "Share of the patches degraded lightly, as a good camera does.")
    enlarged_share: float = flag(
        0.0,
        "Share of the patches that are enlarged with their targets: the network learns that images may be soft, and "
        "does not sharpen them.",
    )
    config_name: Annotated[str, OnResume.INPUT] = flag(
        SMALL_NAFNET, "Folder or Hub id with the network's config.json; its weights are new."
    )
    model_name_or_path: Annotated[str | None, OnResume.INPUT] = flag(
        None, "Network to start from instead of new weights: a folder, an id on the Hub, or module:function."
    )
    half_precision_weights: Annotated[bool, OnResume.FREE] = flag(
        False, "Store the result's weights as float16, half the size; it loads as float32."
    )
    data_card: Annotated[str, OnResume.FREE] = flag(
        "unknown", "Description of the images and their licence, for the model card."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.train_dir is None) == (self.dataset_name is None):
            raise ValueError("Give --train_dir, a folder of clean images, or --dataset_name, and not both.")
        if self.streaming and self.dataset_name is None:
            raise ValueError("--streaming needs --dataset_name; a folder is read image by image anyway.")
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
    """The network to train, new or with the weights of --model_name_or_path.

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


def open_images(args: PretrainArguments, accelerator: Accelerator) -> ImageSource:
    """The clean images by index, checked where that does not take long."""
    if args.train_dir is None:
        images: ImageSource = HubImages(open_split(args), args.image_column)
    else:
        left_out: Counter[str] = Counter()
        images = ImageFiles(list_images(args.train_dir, nested=True, left_out=left_out))
        if left_out:
            accelerator.print(f"{args.train_dir}: {left_out_in_words(left_out)}")
        if len(images) > MOST_CHECKED:  # of so many, hardly one is met again before the memory is full
            images = ImageFiles(images.paths, cache_bytes=0)
    if args.check_pictures == "always" or (args.check_pictures == "auto" and len(images) <= MOST_CHECKED):
        check_images(images, args.resolution)
    return images


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
    """The training samples; their images are checked where that does not take long."""
    degradation, shares = args.degradation(), (args.max_skipped_share, args.enlarged_share)
    if not args.streaming:
        images = open_images(args, accelerator)
        return DegradedPatches(images, degradation, args.resolution, args.seed, *shares)
    stream = ImageStream(open_split(args), args.image_column, args.seed, args.shuffle_block_size)
    with Processes(accelerator).failing_together():
        stream.check(args.resolution, accelerator.process_index, accelerator.num_processes)
    return StreamPatches(stream, degradation, args.resolution, *shares)


def main(args: PretrainArguments) -> None:
    accelerator = create_accelerator(args)
    use_all_cores(accelerator)
    set_seed(args.seed)
    checkpoint = check_output_dir(args, accelerator)
    patches = open_patches(args, accelerator)
    eval_pairs = None
    if args.eval_dir is not None:
        eval_images = ImageFiles(list_images(args.eval_dir, nested=True))
        check_images(eval_images, args.resolution)
        eval_pairs = DegradedImages(eval_images, patches.degradation, args.resolution)
    model = build_model(args).to(accelerator.device)
    check_takes_images(model, args.model_name_or_path or args.config_name, args.resolution)
    if args.push_to_hub and accelerator.is_main_process:  # before the work: what the Hub refuses, it refuses now
        args.hub_model_id = create_hub_repo(
            args.hub_model_id or Path(args.output_dir).resolve().name, private=args.hub_private_repo or None
        )
    with open_output_dir(args, accelerator, checkpoint):
        model, seconds = train(model, patches, args, accelerator, checkpoint, eval_pairs)
        with Processes(accelerator).failing_together():
            if accelerator.is_main_process:
                check_result_is_finite(model, args.resolution, args.max_train_steps, args.learning_rate)
        if accelerator.is_main_process:
            facts = RunFacts(
                args.data_card,
                hardware_name(accelerator.device),
                seconds,
                accelerator.num_processes,
                mixed_precision=accelerator.mixed_precision,
                prolonged=prolonged_in_words(args.output_dir),
            )
            save(model, args, facts, patches.digest.partition(",")[0])


def save(model: torch.nn.Module, args: PretrainArguments, facts: RunFacts, images: str) -> None:
    """Writes the network and its card into the output folder, and pushes them if asked to."""
    dtype = torch.float16 if args.half_precision_weights else torch.float32
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * facts.processes
    began = "" if args.model_name_or_path is None else f", beginning with the weights of {args.model_name_or_path}"
    averaged = f", weights averaged with decay {args.ema_decay}" if args.use_ema else ""
    method = (
        f"Pre-trained to undo synthetic degradations ({', '.join(RandomOrderDegradation().names)}; "
        f"mode `{args.mode}`, see arXiv 2408.01099) on {images}: "
        f"{args.max_train_steps} steps{facts.prolonged} of {batch} patches of {args.resolution}x{args.resolution}, "
        f"seed {args.seed}{began}{averaged}."
    )
    best = read_best(args.output_dir) if args.save_best else None
    method += "" if best is None else f" Best step of the validation: {best_step(best)}."
    loads_from = args.hub_model_id if args.push_to_hub else args.output_dir
    card = backbone_card(model, Path(args.output_dir).resolve().name, loads_from, method, facts)
    with writing_result(args.output_dir):
        # The model itself stays float32, so its config says float32 and that is how it loads.
        weights = {name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}
        model.save_pretrained(args.output_dir, state_dict=weights)
        if hasattr(model, "save_image_processor"):
            model.save_image_processor(args.output_dir)
        write_text(Path(args.output_dir) / "README.md", card)
        if best is not None:
            folder = Path(args.output_dir) / BEST_FOLDER
            title = f"{Path(args.output_dir).resolve().name}, step {best['step']}"
            write_text(folder / "README.md", backbone_card(model, title, str(folder), method, facts))
    print(f"\nSaved in {args.output_dir}.")
    if args.push_to_hub:
        print(f"Pushed to {args.hub_model_id}, commit {push_folder(args.output_dir, args.hub_model_id)}.")
    print(f"Load it with:\n\n{loading_code(loads_from)}")


if __name__ == "__main__":
    run_script(main, PretrainArguments, TrainingDiverged, DataFailed)
