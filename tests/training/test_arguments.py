"""The settings of a run: command line, ranges, learning rate."""

import warnings

import pytest
from transformers import HfArgumentParser

from colora_peft.training.arguments import TrainArguments

REQUIRED = {
    "output_dir": "out",
    "max_train_steps": 10,
    "per_device_train_batch_size": 2,
    "resolution": 8,
    "learning_rate": 0.5,
}


def parse(*flags):
    line = [f"--{name}={value}" for name, value in REQUIRED.items()]
    (parsed,) = HfArgumentParser(TrainArguments).parse_args_into_dataclasses([*line, *flags])
    return parsed


def test_command_line_gives_the_same_settings_as_python():
    assert parse() == TrainArguments(**REQUIRED)
    assert parse("--overwrite_output_dir").overwrite_output_dir is True
    assert parse("--checkpoints_total_limit", "5").checkpoints_total_limit == 5
    assert parse("--resume_from_checkpoint", "latest").resume_from_checkpoint == "latest"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_train_steps", 0),
        ("per_device_train_batch_size", 0),
        ("resolution", -1),
        ("checkpointing_steps", 0),
        ("checkpoints_total_limit", -1),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("max_grad_norm", 0.0),
        ("checkerboard_weight", -1.0),
        ("checkerboard_weight", float("inf")),
        ("gradient_accumulation_steps", 0),
        ("validation_steps", -1),
        ("ema_decay", -0.1),
        ("ema_decay", 1.0),
        ("ema_decay", float("nan")),
        ("lr_warmup_steps", -1),
        ("lr_decay_steps", -1),
        ("dataloader_num_workers", -1),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_value_out_of_range_is_refused_by_flag_and_value(name, value):
    with pytest.raises(ValueError, match=f"--{name} must .*{value}"):
        TrainArguments(**{**REQUIRED, name: value})


def test_what_is_due_every_so_many_steps_is_due_at_the_last_too():
    args = TrainArguments(**REQUIRED)
    assert [done for done in range(1, 11) if args.is_due(4, done)] == [4, 8, 10]
    assert not any(args.is_due(0, done) for done in range(1, 11))


def test_learning_rate_warms_up_and_follows_a_cosine():
    args = TrainArguments(**{**REQUIRED, "max_train_steps": 8, "lr_warmup_steps": 4})
    half = 0.5**0.5
    cosine = [0.5, 0.25 * (1 + half), 0.25, 0.25 * (1 - half), 0.0]
    expected = [0.125, 0.25, 0.375, 0.5, *cosine]
    assert [args.learning_rate_at(step) for step in range(9)] == pytest.approx(expected)


def test_without_warm_up_the_first_step_has_the_peak():
    args = TrainArguments(**REQUIRED)
    assert args.learning_rate_at(0) == 0.5
    assert args.learning_rate_at(5) == pytest.approx(0.25)


@pytest.mark.parametrize(("steps", "warns"), [(4, True), (5, False)])
def test_a_warm_up_that_takes_the_whole_run_is_pointed_out(steps, warns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        TrainArguments(**{**REQUIRED, "max_train_steps": steps, "lr_warmup_steps": 4})
    assert len(caught) == warns and all("ends after 4 steps" in str(each.message) for each in caught)


def test_warmup_stable_decay_stays_at_the_peak_until_the_last_steps():
    schedule = {"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 2, "lr_decay_steps": 4}
    args = TrainArguments(**{**REQUIRED, **schedule})
    half = 0.5**0.5
    decay = [0.5, 0.25 * (1 + half), 0.25, 0.25 * (1 - half), 0.0]
    expected = [0.25, 0.5, 0.5, 0.5, 0.5, 0.5, *decay]
    assert [args.learning_rate_at(step) for step in range(11)] == pytest.approx(expected)


def test_warmup_stable_decay_without_a_decay_ends_at_the_peak():
    args = TrainArguments(**{**REQUIRED, "lr_scheduler": "warmup_stable_decay"})
    assert {args.learning_rate_at(step) for step in range(10)} == {0.5}


def test_a_decay_without_its_schedule_or_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="--lr_decay_steps has no effect without --lr_scheduler warmup_stable_decay"):
        TrainArguments(**{**REQUIRED, "lr_decay_steps": 4})
    too_long = {"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 7, "lr_decay_steps": 4}
    with pytest.raises(ValueError, match="7 and --lr_decay_steps 4 are together more than the 10 steps"):
        TrainArguments(**{**REQUIRED, **too_long})
