"""Measure how much each layer of a pre-trained restoration network contributes to a task, and look at it.

    accelerate launch examples/contribution.py

scores the shipped underwater photos; `--train_dir my/train --eval_dir my/test` your own.
The result, in `outputs/contribution`: a table, the image of it, and `contributions.json`, which `finetune.py
--contributions` takes instead of measuring by itself. Given the same flags, the two measure the same.

The paper's own estimate needs a network that was tuned in full first:

    accelerate launch examples/finetune.py --method full --output_dir outputs/full
    accelerate launch examples/contribution.py --estimator faig --end_model_name_or_path outputs/full
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from restoration_task import (
    CONTRIBUTIONS_FILE,
    FIGURE_FILE,
    HERE,
    TaskArguments,
    check_figures_can_be_drawn,
    load_network,
    load_pairs,
    measure_contributions,
    report_allocation,
)
from transformers import HfArgumentParser

from colora_peft import ContributionScores, FaigSettings, ProbeSettings
from colora_peft.data import PairedPatches
from colora_peft.hub import load_backbone
from colora_peft.training import use_all_cores
from colora_peft.tuner import resolve_ranks
from colora_peft.utils import check_at_least, relative_path

# Above it, the scores of a path say less than they could.
COMPLETENESS_WANTED = 0.05


@dataclass
class ContributionArguments(TaskArguments):
    """Flags of the measurement."""

    output_dir: str = field(
        default="outputs/contribution", metadata={"help": "Folder for contributions.json and the image."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace an earlier measurement in --output_dir."}
    )
    end_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The same network after full tuning on the task, e.g. by finetune.py --method full "
                  "(--estimator faig): a folder or an id on the Hub."},
    )  # fmt: skip
    num_path_steps: int | None = field(
        default=None,
        metadata={"help": "Points on the path of faig and probe; more are slower and lower the completeness error. "
                  f"Default: {FaigSettings.num_path_steps} and {ProbeSettings.num_path_steps}."},
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_path_steps is not None:
            check_at_least(self, "num_path_steps", 1)
            if self.estimator not in ("faig", "probe"):
                raise ValueError(f"--num_path_steps has no effect with --estimator {self.estimator}; leave it out.")
        if self.estimator == "faig" and self.end_model_name_or_path is None:
            raise ValueError(
                "--estimator faig needs --end_model_name_or_path: a network tuned in full on the task "
                "(finetune.py --method full); --estimator probe needs none."
            )
        if self.estimator != "faig" and self.end_model_name_or_path is not None:
            raise ValueError(f"--end_model_name_or_path has no effect with --estimator {self.estimator}; choose faig.")

    def estimator_settings(self) -> FaigSettings | ProbeSettings | None:
        path = {} if self.num_path_steps is None else {"num_path_steps": self.num_path_steps}
        if self.estimator == "faig":
            return FaigSettings(**path)
        return ProbeSettings(num_steps=self.probe_steps, **path) if self.estimator == "probe" else None


def main(args: ContributionArguments) -> None:
    accelerator = Accelerator()
    use_all_cores(accelerator)
    set_seed(args.seed)
    check_figures_can_be_drawn()
    check_output_dir(args)
    train_pairs, _ = load_pairs(args, accelerator)
    patches = PairedPatches(train_pairs, args.resolution, args.seed)
    model = load_network(args, accelerator)
    accelerator.print(f"{len(train_pairs)} pairs, estimator {args.estimator}.")
    end_state = None
    if args.end_model_name_or_path is not None:
        end_model = load_backbone(args.end_model_name_or_path)
        end_state = end_model.to(accelerator.device).state_dict()
    contributions = measure_contributions(model, patches, args, accelerator, end_state)
    if accelerator.is_main_process:
        output_dir = Path(args.output_dir)
        ranks = save_and_allocate(contributions, model, args)
        report_allocation(model, ranks, contributions, output_dir)
        print(how_it_went(contributions))
        print(f"Saved in {output_dir}: {CONTRIBUTIONS_FILE} and {FIGURE_FILE}. Go on with:\n\n{next_command(args)}")
    accelerator.wait_for_everyone()


def check_output_dir(args: ContributionArguments) -> None:
    """Refuse a folder that holds something else, or a measurement that nobody asked to replace. Writes nothing."""
    output_dir = Path(args.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output_dir {output_dir} is a file; choose a folder.")
    found = {path.name for path in output_dir.iterdir()} if output_dir.is_dir() else set()
    if found - {CONTRIBUTIONS_FILE, FIGURE_FILE}:
        raise ValueError(
            f"--output_dir {output_dir} holds files that are not of a measurement; choose another folder."
        )
    if found and not args.overwrite_output_dir:
        raise ValueError(
            f"--output_dir {output_dir} already holds a measurement; add --overwrite_output_dir to replace it or "
            "choose another folder."
        )


def save_and_allocate(
    contributions: ContributionScores, model: torch.nn.Module, args: ContributionArguments
) -> dict[str, int]:
    """The rank of each layer. The scores are kept first: another budget is no reason to measure them again."""
    file, figure = (Path(args.output_dir) / name for name in (CONTRIBUTIONS_FILE, FIGURE_FILE))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.unlink(missing_ok=True)  # it would show earlier scores
    contributions.save(file)
    try:
        return resolve_ranks(args.adapter_config(contributions.scores), model)
    except ValueError as error:
        raise ValueError(f"The scores are in {file}, but no ranks follow from them. {error}") from error


def how_it_went(contributions: ContributionScores) -> str:
    """What was measured, how long it took, and how complete the path's integral is."""
    by = f" by {contributions.num_processes} processes" if contributions.num_processes > 1 else ""
    text = (
        f"{contributions.method}: {contributions.num_batches} batches, {contributions.seconds:.1f} seconds{by}, "
        f"loss {contributions.loss_start:.4f}"
    )
    error = contributions.completeness_error
    if error is None:
        return f"{text}."
    text += (
        f" -> {contributions.loss_end:.4f}. The attributions add up to that change within {100 * error:.2f}% "
        f"(completeness error, {contributions.num_path_steps} path steps)"
    )
    return f"{text}; a larger --num_path_steps lowers it." if error > COMPLETENESS_WANTED else f"{text}."


def next_command(args: ContributionArguments) -> str:
    """The fine-tuning that takes the scores, with the flags of this call that it shares."""
    own = {field.name for field in fields(ContributionArguments)} - {field.name for field in fields(TaskArguments)}
    unused = own | {"estimator", "probe_steps", "probe_batches"}
    words = ["--contributions", str(Path(args.output_dir) / CONTRIBUTIONS_FILE)]
    for flag in fields(args):
        value = getattr(args, flag.name)
        if flag.name not in unused and value != flag.default:
            words += [f"--{flag.name}", str(value)]
    return f"accelerate launch {shlex.quote(relative_path(HERE / 'finetune.py'))} {shlex.join(words)}"


if __name__ == "__main__":
    try:
        (parsed,) = HfArgumentParser(ContributionArguments).parse_args_into_dataclasses()
        main(parsed)
    except (ValueError, TypeError, OSError, ImportError) as error:
        sys.exit(f"contribution.py: {error}")
