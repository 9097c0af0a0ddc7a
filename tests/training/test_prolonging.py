"""A run that is resumed with more --max_train_steps: exact, with the learning rates of the new length."""

import pytest
import torch
from safetensors.torch import load_file
from support.loop import DiesAt, Killed, arguments, assert_equal, nafnet, rows, run

from colora_peft.training import list_checkpoints, prolonged_in_words, read_state

SCHEDULES = [{}, {"lr_scheduler": "warmup_stable_decay", "lr_decay_steps": 2}]
EMA = {"use_ema": True, "ema_decay": 0.6}


def prolong(folder, dataset=None, **settings):
    return run(folder, nafnet(), dataset, resume_from_checkpoint="latest", **settings)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("done", [6, 4])  # finished, and stopped on the way
def test_prolonged_at_one_step_twice_or_interrupted_after_it_ends_bitwise_the_same(tmp_path, schedule, done):
    flags = {**schedule, **EMA, "checkpointing_steps": 2}
    longer = flags | {"max_train_steps": 12}
    for name in ("once", "again", "interrupted"):
        if done == 6:
            run(tmp_path / name, nafnet(), **flags)
        else:
            with pytest.raises(Killed):
                run(tmp_path / name, nafnet(), DiesAt(2 * done + 1), **flags)
    expected = prolong(tmp_path / "once", **longer)
    assert_equal(prolong(tmp_path / "again", **longer), expected)
    for killed_in_step in (7, 11):
        with pytest.raises(Killed):
            prolong(tmp_path / "interrupted", DiesAt(2 * killed_in_step), **longer)
    assert_equal(prolong(tmp_path / "interrupted", **longer), expected)
    for file in ("model", "optimizer", "ema"):
        found = [load_file(tmp_path / name / "checkpoint-12" / f"{file}.safetensors") for name in ("once", "again")]
        assert_equal(*found)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_its_learning_rates_are_those_of_the_new_length_and_it_says_so_once(tmp_path, schedule, capsys):
    run(tmp_path, nafnet(), **schedule)
    assert "prolonged" not in capsys.readouterr().out and prolonged_in_words(tmp_path) == ""
    prolong(tmp_path, max_train_steps=26, **schedule)
    old, new = arguments(tmp_path, **schedule), arguments(tmp_path, max_train_steps=26, **schedule)
    rates = f"was {old.learning_rate_at(5):.3g}, is {new.learning_rate_at(6):.3g} now"
    said = capsys.readouterr().out
    assert said.count("The run is prolonged after step 6 from 6 steps to 26: the learning rate") == 1 and rates in said
    logged = {row["step"]: row["learning_rate"] for row in rows(tmp_path)}
    assert logged == {6: old.learning_rate_at(5), 20: new.learning_rate_at(19), 26: new.learning_rate_at(25)}
    prolong(tmp_path, max_train_steps=26, **schedule)  # finished: nothing is left to do or to say
    assert "prolonged" not in capsys.readouterr().out
    assert prolonged_in_words(tmp_path) == ", prolonged after step 6 of 6"


def test_a_prolonged_run_trains_on(tmp_path):
    before = run(tmp_path, nafnet())
    after = prolong(tmp_path, max_train_steps=9)
    assert not torch.equal(before["intro.weight"], after["intro.weight"])
    assert list_checkpoints(tmp_path)[-1].name == "checkpoint-9"


def test_each_time_is_remembered(tmp_path):
    run(tmp_path, nafnet())
    for steps in (7, 9):
        prolong(tmp_path, max_train_steps=steps)
    assert read_state(tmp_path / "checkpoint-9")["prolonged"] == [
        {"step": 6, "planned": 6},
        {"step": 7, "planned": 7},
    ]
    assert prolonged_in_words(tmp_path) == ", prolonged after step 6 of 6, prolonged after step 7 of 7"


def test_before_its_learning_rate_falls_nothing_is_to_be_said(tmp_path, capsys):
    stable = {"lr_scheduler": "warmup_stable_decay"}
    run(tmp_path, nafnet(), **stable)
    prolong(tmp_path, max_train_steps=9, **stable)
    assert "prolonged" not in capsys.readouterr().out and prolonged_in_words(tmp_path) == ""


def test_it_gets_no_shorter(tmp_path):
    run(tmp_path, nafnet())
    prolong(tmp_path, max_train_steps=8)
    with pytest.raises(ValueError, match="--max_train_steps was 8, now 6"):
        prolong(tmp_path)
