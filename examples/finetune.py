"""Adapts a pre-trained restoration network to pairs of images.

    accelerate launch examples/finetune.py

adapts the shipped network to the shipped underwater photos. For your own:

    accelerate launch examples/finetune.py --train_dir my/train --eval_dir my/test --output_dir outputs/mine

where each folder holds `input/` and `target/` with the same file names. Patterns tell names that differ, such as
`--input_pattern "{}_noisy" --target_pattern "{}_clean"`. The contributions are measured on the way;
`--contributions FILE` takes those that `contribution.py` measured, on whatever network has layers of the same names.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from peft import PeftModel

from colora_peft import CoLoRAConfig, ContributionScores
from colora_peft.contribution import OnePassEstimator
from colora_peft.data import PairedPatches, PairSource
from colora_peft.evaluation import evaluate, restore_some, save_before_after
from colora_peft.hub import (
    AdaptedNetwork,
    RunFacts,
    TuningMetrics,
    adapted_card,
    create_hub_repo,
    hardware_name,
    load_for_training,
    push_folder,
)
from colora_peft.inference import tile_multiple
from colora_peft.ranks import check_figures_can_be_drawn
from colora_peft.training import (
    BEST_FOLDER,
    CONTRIBUTIONS_FILE,
    FIGURE_FILE,
    LEARNING_RATES,
    DataFailed,
    Method,
    OnResume,
    TaskArguments,
    TrainArguments,
    TrainingDiverged,
    check_base_can_be_made_again,
    check_budget,
    check_can_be_saved,
    check_output_dir,
    check_targets_differ,
    checkerboard_obstacle,
    compare_saved,
    create_accelerator,
    leave_wrong_layers_alone,
    load_contributions,
    load_network,
    load_pairs,
    measure_contributions,
    note_on_source,
    open_output_dir,
    prepare_for_tuning,
    prolonged_in_words,
    read_best,
    refusals_in_words,
    report_allocation,
    result_diverged,
    save_result,
    train,
    trained_parameters,
    use_all_cores,
)
from colora_peft.utils import flag, relative_path, run_script, some, write_json, write_text, writing_result

HERE = Path(__file__).parent
SHIPPED_NETWORK = relative_path(HERE / "checkpoints" / "nafnet-small-prod")
NEEDS_MULTIPLE = "if sides must be multiples of some number, set it as the network's attribute needs_multiple_of"
SHIPPED_PAIRS = HERE / "data" / "underwater"


@dataclass
class FinetuneArguments(TaskArguments, TrainArguments):
    """Flags of the fine-tuning."""

    model_name_or_path: str | None = flag(
        None,
        "The pre-trained network: a folder, an id on the Hub, or module:function. Default: the one that "
        f"--adapter_name_or_path names, else {SHIPPED_NETWORK}.",
    )
    adapter_name_or_path: Annotated[str | None, OnResume.INPUT] = flag(
        None, "An adapter to train further, at its ranks: a folder or an id on the Hub, of CoLoRA or of PEFT's LoRA."
    )
    output_dir: str = flag("outputs/finetune", "Path to the folder for checkpoints and the result.")
    max_train_steps: int = flag(500, "Number of optimiser steps of the whole run.")
    learning_rate: float | None = flag(
        None, f"Peak learning rate of AdamW. Default by method: {dict(LEARNING_RATES)}."
    )
    checkerboard_weight: float = flag(
        5.0,
        "Weight of a loss on the grid that networks with PixelShuffle leave on smooth areas, beside the mean absolute "
        "error. Its period is what the network names as pads_to_multiple or needs_multiple_of; it is zero without "
        "that, and where a side of the patches has fewer than four periods.",
    )
    method: Method = flag(
        "colora",
        "colora: ranks by contribution; lora: the same budget, one rank for all; full, decoder, bias: train these "
        "parameters of the network itself.",
    )
    estimator: Literal["probe", OnePassEstimator] = flag(
        TaskArguments.estimator,
        "How contributions are measured (colora). gradient, fisher, taylor: one pass, no tuning; probe: tune for "
        "--probe_steps and walk there. (contribution.py also knows faig.)",
    )
    contributions: Annotated[str | None, OnResume.INPUT] = flag(
        None, "Path to the contributions that contribution.py measured; none are measured then (colora)."
    )
    data_card: Annotated[str | None, OnResume.FREE] = flag(
        None, "Description of the images and their licence, for the model card."
    )

    def __post_init__(self) -> None:
        if self.learning_rate is None:
            self.learning_rate = LEARNING_RATES[self.method]
        if self.adapter_name_or_path is not None:
            self._check_further()
        elif self.model_name_or_path is None:
            self.model_name_or_path = SHIPPED_NETWORK
        if self.contributions is not None and self.method != "colora":
            raise ValueError(f"--contributions has no effect with --method {self.method}; leave one of them out.")
        TaskArguments.__post_init__(self)
        if self.eval_dir is not None and Path(self.eval_dir).resolve() == Path(self.train_dir).resolve():
            raise ValueError(
                "--eval_dir is --train_dir, so that the result would be measured on the pairs it was trained on. "
                "Leave it out, and a fifth of the pairs is held out."
            )
        TrainArguments.__post_init__(self)

    def _check_further(self) -> None:
        """Refuses what a given adapter has settled: its method and its ranks."""
        settled = ("method", "contributions", "parameter_budget", "beta", "estimator")
        defaults = {each.name: each.default for each in fields(self)}
        given = [f"--{name}" for name in settled if getattr(self, name) != defaults[name]]
        if given:
            raise ValueError(
                f"--adapter_name_or_path trains an adapter at its own ranks, so that {some(given)} would have no "
                "effect: leave one or the other out."
            )


# ------------------------------------------------------------------------------------------------------------ network


def open_network(args: FinetuneArguments, accelerator: Accelerator) -> torch.nn.Module:
    """The network to adapt, or the adapter to train further on its base."""
    if args.adapter_name_or_path is None:
        model = load_network(args, accelerator)
        check_can_be_saved(model, args.method, args.model_name_or_path)
        check_base_can_be_made_again(model, args.method, args.model_name_or_path)
        check_budget(model, args.method, args.parameter_budget)
        return model
    model = load_for_training(args.adapter_name_or_path, base=args.model_name_or_path)
    return model.to(accelerator.device, memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------- contributions


def given_contributions(
    model: torch.nn.Module, args: FinetuneArguments, checkpoint: Path | None
) -> ContributionScores | None:
    """Contributions of --contributions, or of the run that goes on; None if they are to be measured or not used."""
    file = args.contributions if checkpoint is None else checkpoint.parent / CONTRIBUTIONS_FILE
    if file is None or args.method != "colora":
        return None
    return load_contributions(file, model, args.model_name_or_path)


# ------------------------------------------------------------------------------------------------------------- main


def main(args: FinetuneArguments) -> None:
    accelerator = create_accelerator(args)
    use_all_cores(accelerator)
    set_seed(args.seed)
    check_figures_can_be_drawn()
    checkpoint = check_output_dir(args, accelerator)
    train_pairs, eval_pairs = load_pairs(args, accelerator, SHIPPED_PAIRS)
    patches = PairedPatches(train_pairs, args.resolution, args.seed)
    check_targets_differ(train_pairs)
    model = open_network(args, accelerator)
    is_further = isinstance(model, PeftModel)
    method = model.peft_config["default"].peft_type.lower() if is_further else args.method
    contributions = None if is_further else given_contributions(model, args, checkpoint)
    accelerator.print(f"{len(train_pairs)} pairs to train on, {len(eval_pairs)} to evaluate on, method {method}.")
    if note := note_on_source(contributions, args.model_name_or_path):
        accelerator.print(note)
    before = evaluate_before(model, eval_pairs, args, accelerator)

    obstacle = checkerboard_obstacle(tile_multiple(model), args.resolution)
    if obstacle is not None and args.checkerboard_weight:
        accelerator.print(f"--checkerboard_weight has no effect: {obstacle}.")
    images = patches[0]["pixel_values"][None].to(accelerator.device)
    if not is_further:
        if contributions is None and args.method == "colora":
            contributions = measure_contributions(model, patches, args, accelerator)
        model = prepare(model, args.adapter_config(contributions and contributions.scores), images, args)
    if args.push_to_hub and accelerator.is_main_process:  # before the work: what the Hub refuses, it refuses now
        args.hub_model_id = create_hub_repo(
            args.hub_model_id or Path(args.output_dir).resolve().name, private=args.hub_private_repo or None
        )
    with open_output_dir(args, accelerator, checkpoint):
        if accelerator.is_main_process and isinstance(model, PeftModel) and not is_further:
            ranks = model.peft_config["default"].ranks
            report_allocation(model.get_base_model(), ranks, contributions, Path(args.output_dir))
        figures = {
            **trained_parameters(model),
            "estimator": contributions.method if contributions else None,
            "seconds_contributions": contributions.seconds if contributions else 0.0,
            "train_pairs": len(train_pairs),
            "eval_pairs": len(eval_pairs),
        }
        accelerator.print(f"{figures['trainable_parameters']:,} parameters are trained.")
        model, seconds = train(model, patches, args, accelerator, checkpoint, eval_pairs)
        after = evaluate_after(model, eval_pairs, args, accelerator)
        if accelerator.is_main_process:
            facts = facts_of(args, accelerator, seconds)
            metrics = TuningMetrics(
                method=method,
                seed=args.seed,
                **quality_metrics(before, after),
                **figures,
                seconds=seconds,
                learning_rate=args.learning_rate,
                checkerboard_weight=0.0 if obstacle else args.checkerboard_weight,
                max_train_steps=args.max_train_steps,
                parameter_budget=args.parameter_budget if isinstance(model, PeftModel) and not is_further else None,
                hardware=facts.hardware,
                processes=facts.processes,
                torch=torch.__version__,
            )
            save(model, eval_pairs, metrics, facts, args)


def evaluate_before(
    model: torch.nn.Module, eval_pairs: PairSource, args: FinetuneArguments, accelerator: Accelerator
) -> dict[str, float]:
    """Figures of the inputs and of the network before the training, printed."""
    name = args.model_name_or_path or args.adapter_name_or_path
    with refusals_in_words(f"{name} does not restore the photos to evaluate on", remedy=NEEDS_MULTIPLE):
        before = evaluate(model, eval_pairs, accelerator.device, "before" if accelerator.is_main_process else "")
    if not math.isfinite(before["psnr"]):
        raise ValueError(
            f"{name} returns NaN or infinite values for the pairs to "
            "evaluate on, before any training: its weights are broken, or too large for half precision."
        )
    accelerator.print(quality_line("input", before["psnr_input"], before["ssim_input"]))
    accelerator.print(quality_line("before", before["psnr"], before["ssim"]))
    return before


def evaluate_after(
    model: torch.nn.Module, eval_pairs: PairSource, args: FinetuneArguments, accelerator: Accelerator
) -> dict[str, float]:
    """Figures of the network after the training, printed."""
    after = evaluate(model, eval_pairs, accelerator.device, "after" if accelerator.is_main_process else "")
    if not math.isfinite(after["psnr"]):  # the last step is followed by no loss that would show it
        raise result_diverged(args.max_train_steps, args.learning_rate)
    accelerator.print(quality_line("after", after["psnr"], after["ssim"]))
    return after


def prepare(
    model: torch.nn.Module, config: CoLoRAConfig, images: torch.Tensor, args: FinetuneArguments
) -> torch.nn.Module:
    """The network with what the method trains; layers that no adapter can follow are left alone, with a note."""
    model = prepare_for_tuning(model, args.method, config)
    if not isinstance(model, PeftModel):
        return model
    model, wrong = leave_wrong_layers_alone(model, args.method, config, images)
    if wrong and PartialState().is_main_process:
        print(f"Left alone, as the network itself writes or reads their weights: {some(wrong, 5)}.")
    if model.peft_config["default"].base_model_name_or_path is None:
        model.peft_config["default"].base_model_name_or_path = args.model_name_or_path  # a function
    return model


def facts_of(args: FinetuneArguments, accelerator: Accelerator, seconds: float) -> RunFacts:
    """Data, hardware and time of the run, for its card."""
    on_hub = args.dataset_name if args.dataset_name and not Path(args.dataset_name).exists() else None
    return RunFacts(
        data_description(args),
        hardware_name(accelerator.device),
        seconds,
        accelerator.num_processes,
        on_hub,
        accelerator.mixed_precision,
        prolonged_in_words(args.output_dir),
    )


def quality_metrics(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """PSNR and SSIM of the inputs, and of the network before and after."""
    return {
        f"{figure}_{when}": value
        for figure in ("psnr", "ssim")
        for when, value in (("input", before[f"{figure}_input"]), ("before", before[figure]), ("after", after[figure]))
    }


def quality_line(name: str, psnr_db: float, ssim: float) -> str:
    return f"{name:>8}: PSNR {psnr_db:.2f} dB, SSIM {ssim:.3f}"


def save(
    model: torch.nn.Module, eval_pairs: PairSource, metrics: TuningMetrics, facts: RunFacts, args: FinetuneArguments
) -> None:
    """Writes the result, its images, its card and last the metrics, says how to load it, and pushes it if asked to."""
    output_dir = Path(args.output_dir)
    is_adapter = isinstance(model, PeftModel)
    images = {"before_after.png": "input, restored, target"}
    if is_adapter and args.adapter_name_or_path is None:
        images[FIGURE_FILE] = "score and rank of each layer"
    network = model.get_base_model() if is_adapter else model
    result = AdaptedNetwork(
        title=output_dir.resolve().name,
        loads_from=args.hub_model_id if args.push_to_hub else args.output_dir,
        base=args.model_name_or_path or model.peft_config["default"].base_model_name_or_path,
        base_revision=getattr(getattr(network, "config", None), "_commit_hash", None),
        is_adapter=is_adapter,
        images=images,
        began_with=args.adapter_name_or_path,
        is_lora=metrics.method == "lora" and args.adapter_name_or_path is not None,
    )
    with writing_result(output_dir):
        save_result(model, output_dir)
    if is_adapter:
        model, metrics = as_saved(model, metrics, eval_pairs, output_dir, result.base)
    before_after = restore_some(model, eval_pairs, count=4)
    with writing_result(output_dir):
        save_before_after(before_after, output_dir / "before_after.png")
        best = read_best(output_dir) if args.save_best else None
        if best is not None:
            write_best_card(result, metrics, facts, best, output_dir / BEST_FOLDER)
        write_text(output_dir / "README.md", adapted_card(result, metrics, facts, best))
        write_json(output_dir / "metrics.json", asdict(metrics))
    print(f"Saved in {output_dir}: the result, its card, metrics.json and images.")
    if args.push_to_hub:
        commit = push_folder(output_dir, args.hub_model_id)
        print(f"Pushed to {args.hub_model_id}, commit {commit}.")
        if is_adapter and not result.is_base_on_hub:
            print(f"Note: its base, {result.base}, is not on the Hub; who loads it must pass base=.")
    print(f"Load it with:\n\n{result.code()}")


def as_saved(
    model: torch.nn.Module, metrics: TuningMetrics, eval_pairs: PairSource, folder: Path, base: str
) -> tuple[torch.nn.Module, TuningMetrics]:
    """The network and its figures as whoever loads the saved adapter will have them, and a note if they are others."""
    difference = compare_saved(model, folder, base, eval_pairs)
    if difference is None:
        return model, metrics
    print(difference.message)
    if difference.network is None:
        return model, metrics
    after = evaluate(difference.network, eval_pairs, next(model.parameters()).device, "saved")
    print(quality_line("saved", after["psnr"], after["ssim"]))
    return difference.network, replace(metrics, psnr_after=after["psnr"], ssim_after=after["ssim"])


def write_best_card(
    result: AdaptedNetwork, metrics: TuningMetrics, facts: RunFacts, best: dict[str, float], folder: Path
) -> None:
    own = replace(result, title=f"{result.title}, step {best['step']}", loads_from=str(folder), images={})
    figures = replace(metrics, psnr_after=best["psnr"], ssim_after=best["ssim"])
    write_text(folder / "README.md", adapted_card(own, figures, facts, best))


def data_description(args: FinetuneArguments) -> str:
    """The training data in words, for the card."""
    if args.data_card is not None:
        return args.data_card
    if args.dataset_name is not None:
        return f"the dataset {args.dataset_name}"
    if args.train_dir is not None:
        return f"the folder {Path(args.train_dir).name}"
    return "underwater photos of LSUI from the U-shape Transformer repository (MIT)"


if __name__ == "__main__":
    run_script(main, FinetuneArguments, TrainingDiverged, DataFailed)
