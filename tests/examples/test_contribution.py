"""examples/contribution.py: launched as a user would, then its laws and its complaints in one process."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from PIL import Image
from support.examples import EXAMPLES, load_example, write_pairs
from transformers import AutoModelForImageToImage, HfArgumentParser

from colora_peft import CoLoRAConfig, ContributionScores
from colora_peft.ranks import mean_scores
from colora_peft.training.task import source_of

contribution = load_example("contribution")
finetune = load_example("finetune")

TASK = ["--per_device_train_batch_size", "2", "--resolution", "32", "--probe_steps", "2", "--probe_batches", "2"]
TRAINING = ["--max_train_steps", "2", "--checkpointing_steps", "2"]


def parsed(arguments, flags):
    (args,) = HfArgumentParser(arguments).parse_args_into_dataclasses([str(flag) for flag in flags])
    return args


def measure(*flags: object) -> Path:
    args = parsed(contribution.ContributionArguments, flags)
    contribution.main(args)
    return Path(args.output_dir)


def tune(*flags: object) -> Path:
    args = parsed(finetune.FinetuneArguments, [*flags, *TRAINING])
    finetune.main(args)
    return Path(args.output_dir)


@pytest.fixture
def task(train_dir, eval_dir, tiny_nafnet):
    return ["--train_dir", train_dir, "--eval_dir", eval_dir, "--model_name_or_path", tiny_nafnet, *TASK]


@pytest.fixture
def flags(task, tmp_path):
    return [*task, "--output_dir", tmp_path / "contribution"]


def test_launched_run_leaves_all_and_the_command_it_prints_goes_on(flags, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", str(EXAMPLES / "contribution.py"), *map(str, flags)]
    done = subprocess.run([*command, "--estimator", "probe"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    output_dir = tmp_path / "contribution"
    assert {path.name for path in output_dir.iterdir()} == {"contributions.json", "contribution.png"}
    scores = ContributionScores.load(output_dir / "contributions.json")
    assert scores.method == "probe" and scores.num_batches == 2 and max(scores.scores.values()) > 0
    with Image.open(output_dir / "contribution.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50
    assert all(layer in done.stdout for layer in scores.scores)
    assert "% of the weights trained" in done.stdout and "seconds" in done.stdout
    assert f"{100 * scores.completeness_error:.2f}%" in done.stdout

    words = shlex.split(done.stdout.strip().splitlines()[-1])
    assert words[:2] == ["accelerate", "launch"] and Path(words[2]).samefile(EXAMPLES / "finetune.py")
    tuned = tune(*words[3:], "--output_dir", tmp_path / "tuned")
    assert ContributionScores.load(tuned / "contributions.json") == scores


@pytest.mark.parametrize("estimator", ["probe", "gradient"])
def test_finetune_measures_the_same_by_itself(task, flags, tmp_path, estimator):
    """Also the same adapter, to the bit."""
    file = measure(*flags, "--estimator", estimator) / "contributions.json"
    given = tune(*task, "--contributions", file, "--output_dir", tmp_path / "given")
    alone = tune(*task, "--estimator", estimator, "--output_dir", tmp_path / "alone")
    first, second = (ContributionScores.load(folder / "contributions.json") for folder in (file.parent, alone))
    assert first.scores == second.scores and first.method == second.method == estimator
    adapters = [(folder / "adapter_model.safetensors").read_bytes() for folder in (given, alone)]
    assert adapters[0] == adapters[1]
    metrics = json.loads((given / "metrics.json").read_text())
    assert metrics["estimator"] == estimator and metrics["seconds_contributions"] == first.seconds


def test_faig_walks_to_a_tuned_network(task, flags, tmp_path, capsys):
    tuned = tune(*task, "--method", "full", "--output_dir", tmp_path / "full")
    assert json.loads((tuned / "metrics.json").read_text())["estimator"] is None
    faig = ["--estimator", "faig", "--end_model_name_or_path", tuned]
    fine = ContributionScores.load(measure(*flags, *faig) / "contributions.json")
    assert (fine.method, fine.num_path_steps) == ("faig", 16) and fine.completeness_error < 0.02
    coarse = measure(*flags, *faig, "--num_path_steps", 1, "--overwrite_output_dir") / "contributions.json"
    assert ContributionScores.load(coarse).num_path_steps == 1


def test_layers_that_training_does_not_know_are_refused_before_it(task, flags, tmp_path):
    file = measure(*flags, "--estimator", "gradient") / "contributions.json"
    content = json.loads(file.read_text())
    first = next(iter(content["scores"]))
    content["scores"][f"{first}x"] = content["scores"].pop(first)
    file.write_text(json.dumps(content))
    output = ["--output_dir", tmp_path / "out"]
    with pytest.raises(ValueError, match=f"of another network than .*'{first}x'.*did you mean '{first}'.*again"):
        tune(*task, *output, "--contributions", file)
    content["scores"].pop(f"{first}x")
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"of another network than .*'{first}' is missing"):
        tune(*task, *output, "--contributions", file)
    with pytest.raises(ValueError, match="Cannot read contribution scores from .*nowhere.json"):
        tune(*task, *output, "--contributions", tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match="--contributions has no effect with --method lora"):
        tune(*task, *output, "--contributions", file, "--method", "lora")
    assert not (tmp_path / "out").exists()


def test_what_was_measured_is_recorded_and_another_network_is_pointed_out(task, flags, tmp_path, tiny_nafnet, capsys):
    file = measure(*flags, "--estimator", "gradient") / "contributions.json"
    source = ContributionScores.load(file).source
    assert source == {
        "model_name_or_path": str(tiny_nafnet),
        "train_dir": str(task[1]),
        "resolution": 32,
        "per_device_train_batch_size": 2,
        "seed": 0,
        "probe_batches": 2,
    }
    assert "Note:" not in capsys.readouterr().out
    twin = tmp_path / "twin"
    shutil.copytree(tiny_nafnet, twin)
    given = ["--contributions", file]
    tune(*task, *given, "--output_dir", tmp_path / "same")
    assert "Note:" not in capsys.readouterr().out
    tuned = tune(*task, *given, "--model_name_or_path", twin, "--output_dir", tmp_path / "transfer")
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Note:")]
    assert notes == [f"Note: the contributions were measured on {tiny_nafnet}, this run adapts {twin}."]
    # The record goes with the scores.
    assert ContributionScores.load(tuned / "contributions.json").source == source


def test_data_that_was_measured_on_is_named():
    arguments = contribution.ContributionArguments
    assert source_of(arguments())["train_dir"] == "shipped underwater photos"
    source = source_of(arguments(dataset_name="somebody/pairs"))
    assert source["dataset_name"] == "somebody/pairs" and "train_dir" not in source


def test_a_measurement_is_replaced_on_request_only(flags, tmp_path):
    output_dir = measure(*flags, "--estimator", "gradient")
    before = (output_dir / "contributions.json").read_bytes()
    with pytest.raises(ValueError, match="already holds a measurement; add --overwrite_output_dir"):
        measure(*flags, "--estimator", "fisher")
    assert (output_dir / "contributions.json").read_bytes() == before
    measure(*flags, "--estimator", "fisher", "--overwrite_output_dir")
    assert ContributionScores.load(output_dir / "contributions.json").method == "fisher"
    (output_dir / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="files that are not of a measurement"):
        measure(*flags, "--overwrite_output_dir")
    with pytest.raises(ValueError, match="is a file"):
        measure(*flags, "--output_dir", output_dir / "thesis.txt")


def test_scores_survive_a_budget_that_pays_for_no_rank(flags):
    output_dir = measure(*flags, "--estimator", "gradient")
    with pytest.raises(ValueError, match="scores are in .*contributions.json.* parameter_budget to at least"):
        measure(*flags, "--estimator", "fisher", "--overwrite_output_dir", "--parameter_budget", "1e-6")
    assert {path.name for path in output_dir.iterdir()} == {"contributions.json"}
    assert ContributionScores.load(output_dir / "contributions.json").method == "fisher"


@pytest.mark.slow
def test_two_launched_processes_share_the_batches(flags, task, tmp_path):
    """Also in finetune.py, whose ranks come out the same."""
    alone = ContributionScores.load(measure(*flags) / "contributions.json")
    # torchrun: on a CPU `accelerate launch` starts one process, whatever --num_processes says.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = os.environ | {"ACCELERATE_USE_CPU": "true"}
    scripts = {"contribution": [], "finetune": TRAINING}
    for script, more in scripts.items():
        words = [*task, *more, "--output_dir", tmp_path / f"two-{script}"]
        done = subprocess.run(
            [*launch, EXAMPLES / f"{script}.py", *map(str, words)], capture_output=True, text=True, env=env
        )
        assert done.returncode == 0, done.stderr
        together = ContributionScores.load(tmp_path / f"two-{script}" / "contributions.json")
        assert together.num_processes == 2 and together.num_batches == alone.num_batches
        assert together.scores == pytest.approx(alone.scores, rel=1e-4)
        assert done.stdout.count("% of the weights trained") == 1


@pytest.mark.parametrize(
    ("bad", "culprit"),
    [
        (["--estimator", "faig"], "needs --end_model_name_or_path"),
        (["--end_model_name_or_path", "x"], "no effect with --estimator gradient"),
        (["--num_path_steps", "2"], "num_path_steps has no effect with --estimator gradient"),
        (["--num_path_steps", "0"], "--num_path_steps must be at least 1, got 0"),
        (["--probe_batches", "0"], "--probe_batches must be at least 1"),
        (["--resolution", "0"], "--resolution must be at least 1"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--parameter_budget", "2"], "parameter_budget is 2"),
        (["--dataset_name", "somebody/pairs"], "exclude each other"),
    ],
)
def test_bad_flags_are_refused(flags, tmp_path, bad, culprit):
    with pytest.raises(ValueError, match=culprit):
        measure(*flags, *bad)
    assert not (tmp_path / "contribution").exists()


def test_one_pair_cannot_be_split(tmp_path):
    with pytest.raises(ValueError, match="One pair cannot be split"):
        measure("--train_dir", write_pairs(tmp_path / "pairs", 1), "--output_dir", tmp_path / "contribution")
    assert not (tmp_path / "contribution").exists()


def test_end_weights_of_another_network_are_named(flags, tmp_path):
    from colora_peft.models import NAFNetConfig, NAFNetForImageRestoration

    torch.manual_seed(0)
    config = NAFNetConfig(width=16, encoder_blocks=(1, 1), middle_blocks=1, decoder_blocks=(1, 1))
    NAFNetForImageRestoration(config).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"End weight '.*' has shape .*, the model's has"):
        measure(*flags, "--estimator", "faig", "--end_model_name_or_path", tmp_path / "wide")
    assert not (tmp_path / "contribution").exists()


# --------------------------------------------------------------------------------------- contributions for any task


def ranks_of(folder, **settings):
    model = get_peft_model(AutoModelForImageToImage.from_pretrained(folder), CoLoRAConfig(**settings))
    return model.peft_config["default"].ranks


def test_a_prior_is_the_mean_of_the_tasks_and_decides_the_ranks(tiny_nafnet, tmp_path):
    network = shutil.copytree(tiny_nafnet, tmp_path / "network")
    folders = [write_pairs(tmp_path / name, count) for name, count in (("one", 3), ("other", 4))]
    flags = ["--model_name_or_path", network, "--resolution", "32", "--probe_batches", "1"]
    uniform = ranks_of(network)
    args = parsed(contribution.ContributionArguments, [*flags, "--prior_dirs", *folders])
    contribution.main(args)
    scores = json.loads((network / "config.json").read_text())["colora_contributions"]
    alone = [
        measure(
            *flags, "--train_dir", folder, "--eval_dir", folder, "--output_dir", tmp_path / f"{folder.name}-scores"
        )
        for folder in folders
    ]
    expected = mean_scores([ContributionScores.load(folder / "contributions.json") for folder in alone])
    assert scores == pytest.approx(expected, rel=1e-3) and sum(scores.values()) == pytest.approx(1, rel=1e-3)
    assert ranks_of(network) == ranks_of(network, contributions=scores) != uniform
    assert ranks_of(network, beta=0) == uniform


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model_name_or_path": "nowhere"}, "nowhere is no folder with a config.json"),
        ({"train_dir": "a"}, "--prior_dirs excludes --train_dir"),
        ({"estimator": "faig", "end_model_name_or_path": "b"}, "--prior_dirs excludes .* faig"),
    ],
)
def test_a_prior_with_flags_that_do_not_fit_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        contribution.ContributionArguments(prior_dirs=["a"], **wrong)
