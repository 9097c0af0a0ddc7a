"""Measures how much each layer of a pre-trained restoration network contributes to a task, and shows it.

    accelerate launch examples/contribution.py

scores the shipped underwater photos; `--train_dir my/train --eval_dir my/test` your own.
The result, in `outputs/contribution`: a table, a figure of it, and `contributions.json`, which `finetune.py
--contributions` takes instead of measuring by itself. Given the same flags, the two measure the same.

The paper's own estimate needs a network that was tuned in full first:

    accelerate launch examples/finetune.py --method full --output_dir outputs/full
    accelerate launch examples/contribution.py --estimator faig --end_model_name_or_path outputs/full

A network can carry contributions that serve any task, so that `CoLoRAConfig()` on it needs no data:

    accelerate launch examples/contribution.py --prior_dirs underwater/train noise/train rain/train --probe_batches 16

writes the mean over these tasks into the config.json of --model_name_or_path, as `colora_contributions`.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from colora_peft import ContributionScores, FaigSettings, ProbeSettings
from colora_peft.data import PairedPatches
from colora_peft.hub import load_backbone
from colora_peft.ranks import check_figures_can_be_drawn, mean_scores
from colora_peft.training import (
    CONTRIBUTIONS_FILE,
    FIGURE_FILE,
    TaskArguments,
    load_network,
    load_pairs,
    measure_contributions,
    open_pairs,
    report_allocation,
    use_all_cores,
)
from colora_peft.tuner import PRIOR_CONTRIBUTIONS, resolve_ranks
from colora_peft.utils import Processes, check_at_least, check_writable, flag, relative_path, run_script, write_json

HERE = Path(__file__).parent

# Largest completeness error of a path whose scores need no more steps.
COMPLETENESS_WANTED = 0.05


@dataclass
class ContributionArguments(TaskArguments):
    """Flags of the measurement."""

    model_name_or_path: str = flag(
        relative_path(HERE / "checkpoints" / "nafnet-small-prod"),
        "The pre-trained network: a folder, an id on the Hub, or module:function.",
    )
    output_dir: str = flag("outputs/contribution", "Path to the folder for contributions.json and the figure.")
    overwrite_output_dir: bool = flag(False, "Replace an earlier measurement in --output_dir.")
    end_model_name_or_path: str | None = flag(
        None,
        "The same network after full tuning on the task, e.g. by finetune.py --method full "
        "(--estimator faig): a folder or an id on the Hub.",
    )
    num_path_steps: int | None = flag(
        None,
        "Number of points on the path of faig and probe; more are slower and lower the completeness error. "
        f"Default: {FaigSettings.num_path_steps} and {ProbeSettings.num_path_steps}.",
    )

    prior_dirs: list[str] | None = flag(
        None,
        "Folders with input/ and target/, one for each task: instead of a measurement in --output_dir, the mean of "
        "their contributions goes into the config.json of --model_name_or_path, which must be a folder.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prior_dirs is not None:
            if self.train_dir or self.dataset_name or self.estimator == "faig":
                raise ValueError(
                    "--prior_dirs excludes --train_dir, --dataset_name and --estimator faig; leave them out."
                )
            if not (Path(self.model_name_or_path) / "config.json").is_file():
                raise ValueError(f"--model_name_or_path {self.model_name_or_path} is no folder with a config.json.")
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
    if args.prior_dirs is not None:
        write_prior(args, accelerator)
        return
    check_figures_can_be_drawn()
    check_output_dir(args)
    with Processes(accelerator).failing_together():
        if accelerator.is_main_process:
            check_writable(args.output_dir)
    train_pairs, _ = load_pairs(args, accelerator, HERE / "data" / "underwater")
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


def write_prior(args: ContributionArguments, accelerator: Accelerator) -> None:
    """Writes the mean of the tasks' contributions, each counting alike, into the network's configuration."""
    with Processes(accelerator).failing_together():
        if accelerator.is_main_process:
            check_writable(args.model_name_or_path, "--model_name_or_path")
    measured = []
    for folder in args.prior_dirs:
        set_seed(args.seed)
        patches = PairedPatches(open_pairs(args, folder, accelerator), args.resolution, args.seed)
        task = replace(args, prior_dirs=None, train_dir=folder)
        measured.append(measure_contributions(load_network(args, accelerator), patches, task, accelerator))
    scores = mean_scores(measured)
    if accelerator.is_main_process:
        path = Path(args.model_name_or_path) / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        # Four digits: the ranks that follow do not see more, and the file stays readable.
        config[PRIOR_CONTRIBUTIONS] = {layer: float(f"{score:.4g}") for layer, score in scores.items()}
        write_json(path, config)
        print(f"The contributions of {len(scores)} layers are in {path}.")


def check_output_dir(args: ContributionArguments) -> None:
    """Refuses a folder that holds something else, or a measurement that nobody asked to replace. Writes nothing."""
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
    """The measurement in one sentence: batches, time, loss and how complete the path's integral is."""
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
    for setting in fields(args):
        value = getattr(args, setting.name)
        if setting.name not in unused and value != setting.default:
            words += [f"--{setting.name}", str(value)]
    return f"accelerate launch {shlex.quote(relative_path(HERE / 'finetune.py'))} {shlex.join(words)}"


if __name__ == "__main__":
    run_script(main, ContributionArguments)
