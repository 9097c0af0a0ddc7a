"""The paper's two comparisons on your pairs: of pre-trainings, and of ways to tune.

    python -m examples.experiments.methods.run --data_dir path/to/data --comparisons tuning

Every cell is a run of the engine of finetune.py: the same steps, batches and patches for all. The learning rate of
each method, network and task is the best of --learning_rates (of --full_learning_rates for full tuning) on pairs held
out of the training folder, with a seed of its own. The test folder is touched by the other seeds alone, at that rate.
colora_default has the rate and the loss that finetune.py has without a flag, colora_plain that rate alone.
full_checkerboard and peft_lora_checkerboard have that loss, at the rate chosen without it. All others train on the
mean absolute error. Images are evaluated on their centres (--evaluated_size). Cells are kept and not run again: the
comparison grows over many calls, and several processes may share the work (--part 0/2 and 1/2), also on one GPU. Each
call ends by writing the report of all cells. A cell takes about 25 seconds on one core, and the default plan has 390:
choose with --tasks, --methods and --budgets.
"""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForImageToImage

from colora_peft import CoLoRAConfig, base_fingerprint
from colora_peft.data import DegradedImages, ImageFiles, PairedImageFolder, PairSource, check_pairs
from colora_peft.evaluation import evaluate
from colora_peft.hub import load_backbone, register_backbones
from colora_peft.images import list_images
from colora_peft.prod import RandomOrderDegradation
from colora_peft.training import DataFailed, prepare_for_tuning
from colora_peft.tuner import METHOD_VERSION
from colora_peft.utils import run_script
from examples.experiments.grid.cells import (
    Cell,
    CellFile,
    measure_contributions,
    own_accelerator,
    own_part,
    run_arguments,
    train_and_validate,
)
from examples.experiments.grid.tuned import (
    CELLS_FILE,
    TunedGrid,
    check_same_settings,
    draw,
    method_settings,
    settings_of,
)
from examples.experiments.methods.mean_matched import psnr_mean_matched
from examples.experiments.methods.peft_lora import add_peft_lora
from examples.experiments.methods.plan import (
    BUDGET,
    NONE,
    PEFT_LORA,
    BenchmarkArguments,
    Variant,
    plan,
)
from examples.experiments.methods.plots import save_best_median_worst
from examples.experiments.methods.report import IMAGES_FOLDER, check_names, write_report


def shared_settings(args: BenchmarkArguments, accelerator: Accelerator) -> Cell:
    """Settings that all cells of a comparison have in common."""
    names = ("max_train_steps", "resolution", "per_device_train_batch_size", "evaluated_size", "validation_pairs")
    tuning = ("tuning_seed", "tuned_at")
    run = run_arguments(args, "", args.learning_rates[0], args.seeds[0])
    return {
        **{name: getattr(args, name) for name in (*names, *tuning)},
        "estimator": run.estimator,
        "probe_batches": run.probe_batches,
        **method_settings(),
        "method_version": METHOD_VERSION,
        "mixed_precision": accelerator.mixed_precision,
    }


def load_network(args: BenchmarkArguments, name: str, accelerator: Accelerator) -> nn.Module:
    """The network of this name, or new weights of the first one's shape."""
    path = args.network_paths()[name]
    if name == NONE:
        register_backbones()
        network = AutoModelForImageToImage.from_config(AutoConfig.from_pretrained(path))
    else:
        network = load_backbone(path)
    return network.to(accelerator.device, memory_format=torch.channels_last)


def run_cell(args: BenchmarkArguments, variant: Variant, rate: float, seed: int, accelerator: Accelerator) -> Cell:
    """Trains once; returns quality on the test folder, for the tuning seed on pairs held out of the training one."""
    drawn = draw(args, args.train_dir(variant.task), variant.train_pairs, seed)
    set_seed(seed)
    network = load_network(args, variant.network, accelerator)
    config, found = CoLoRAConfig(parameter_budget=variant.parameter_budget or BUDGET), {}
    with tempfile.TemporaryDirectory() as folder:
        run = replace(run_arguments(args, folder, rate, seed), checkerboard_weight=variant.checkerboard_weight)
        if variant.trains == "colora":
            scores = measure_contributions(network, drawn.patches, run, accelerator)
            config.contributions, found = scores.scores, {"seconds_contributions": scores.seconds}
        set_seed(seed)
        if variant.trains == PEFT_LORA:
            model = add_peft_lora(network, config.parameter_budget)
        else:
            model = prepare_for_tuning(network, variant.trains, config)
        also = None
        if seed != args.tuning_seed:
            is_shown = seed == args.seeds[0]
            also = partial(look_further, args, variant, drawn.evaluated, is_shown, accelerator)
        found |= train_and_validate(model, drawn.patches, drawn.evaluated, run, accelerator, also)
    return found


@cache
def weights_of(path: str) -> str:
    """Fingerprint of a network's weights."""
    return base_fingerprint(load_backbone(path))


@cache
def pairs_of(folder: Path) -> str:
    """Digest of a folder of pairs."""
    return PairedImageFolder(folder).digest


def identity(args: BenchmarkArguments, variant: Variant) -> Cell:
    """Fingerprint of the weights, digest of the pairs and weight of the loss on checkerboards of a variant."""
    weights = weights_of(args.network_paths()[variant.network])
    folder = Path(args.data_dir) / variant.task
    return {
        "weights": f"new, of the shape of {weights}" if variant.network == NONE else weights,
        "data": f"{pairs_of(folder / 'train')}; {pairs_of(folder / 'test')}",
        **({"checkerboard_weight": variant.checkerboard_weight} if variant.checkerboard_weight else {}),
    }


def look_further(
    args: BenchmarkArguments,
    variant: Variant,
    evaluated: PairSource,
    is_shown: bool,
    accelerator: Accelerator,
    model: nn.Module,
) -> Cell:
    """PSNR (dB) of mean-matched images, and on the task of the pre-training; saves images if they are shown.

    The task of the pre-training is to restore patches of the test folder's clean images, degraded by PROD. They are
    the same for all cells of a task. Adapters are switched off for it.
    """
    if is_shown:
        name = "-".join(f"{value}" for value in settings_of(variant).values())
        save_best_median_worst(model, evaluated, Path(args.output_dir) / IMAGES_FOLDER / f"{name}.jpg")
    found = psnr_mean_matched(model, evaluated, accelerator.device)
    images = ImageFiles(list_images(Path(args.data_dir) / variant.task / "test" / "target"))
    pairs = DegradedImages(images, RandomOrderDegradation(), args.resolution)
    with model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
        return {**found, "psnr_old_task": evaluate(model, pairs, accelerator.device, "")["psnr"]}


def run_missing(args: BenchmarkArguments, folder: Path) -> None:
    """Runs the cells of the plan that the folder lacks, after a check of all data.

    Raises:
        ValueError: Several processes were launched, or the folder has cells of other settings, weights or pairs.
    """
    accelerator = own_accelerator()
    check_same_settings(folder, shared_settings(args, accelerator))
    variants, file = plan(args), CellFile(folder / CELLS_FILE)
    check_names([*file.cells, *({**settings_of(variant), **identity(args, variant)} for variant in variants)])
    check_data(args)
    groups = own_part(list(dict.fromkeys(variant.tuned_as(args) for variant in variants)), args.part)
    tuned_as, known = (lambda variant: variant.tuned_as(args)), partial(identity, args)
    run_variant = partial(run_cell, args, accelerator=accelerator)
    grid = TunedGrid(
        args,
        file,
        tuned_as,
        run_variant,
        known,
        retry_failed=args.retry_failed,
        fixed_rate=lambda variant: variant.fixed_rate,
        own_rates=lambda variant: variant.own_rates(args),
    )
    grid.run([variant for variant in variants if variant.tuned_as(args) in groups])


def check_data(args: BenchmarkArguments) -> None:
    """Reads every pair once, so that none is found to be bad hours later.

    Raises:
        ValueError: An image is unreadable, too small or of another size than its target; names it.
    """
    for task in args.tasks:
        for split in ("train", "test"):
            check_pairs(
                PairedImageFolder(Path(args.data_dir) / task / split), args.resolution, "a patch (--resolution)"
            )


def main(args: BenchmarkArguments) -> None:
    """Runs the cells that the folder lacks, unless --report_only, and writes the report of all."""
    folder = Path(args.output_dir)
    if not args.report_only:
        run_missing(args, folder)
    print(write_report(folder))


if __name__ == "__main__":
    run_script(main, BenchmarkArguments, DataFailed)
