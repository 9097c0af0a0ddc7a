"""The output folder: what is refused, what is created, and where a resumed run goes on."""

import errno
import json
import os
from dataclasses import asdict, dataclass

import pytest
from accelerate import Accelerator
from support.examples import load_example

from colora_peft.training import output_dir as module
from colora_peft.training.loop import TrainArguments
from colora_peft.training.output_dir import check_output_dir, open_output_dir

FinetuneArguments = load_example("finetune").FinetuneArguments
PretrainArguments = load_example("pretrain").PretrainArguments


@dataclass
class NewerArguments(TrainArguments):
    invented_later: int = 3


def arguments(folder, kind=TrainArguments, **settings):
    sizes = {"max_train_steps": 9, "per_device_train_batch_size": 2, "resolution": 8, "learning_rate": 0.1}
    return kind(output_dir=str(folder), **(sizes | settings))


def prepare(folder, **settings):
    args = arguments(folder, **settings)
    checkpoint = check_output_dir(args)
    with open_output_dir(args, Accelerator(cpu=True), checkpoint):
        return checkpoint


def checkpoint(folder, step, **settings):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    state = {"step": step, "arguments": asdict(arguments(folder, **settings))}
    (path / "trainer_state.json").write_text(json.dumps(state))
    return path


def files(folder):
    """Names that a user sees in it."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def listing(folder):
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def assert_refused(tmp_path, folder, match, **settings):
    before = listing(tmp_path)
    with pytest.raises(ValueError, match=match):
        prepare(folder, **settings)
    assert listing(tmp_path) == before


def test_new_folder_holds_the_settings_of_the_run(tmp_path):
    assert prepare(tmp_path / "a" / "b", seed=5) is None
    assert files(tmp_path / "a" / "b") == ["run.json"]
    assert json.loads((tmp_path / "a" / "b" / "run.json").read_text()) == asdict(
        arguments(tmp_path / "a" / "b", seed=5)
    )


def test_empty_folder_is_taken(tmp_path):
    assert prepare(tmp_path) is None
    assert (tmp_path / "run.json").is_file()


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_folder_is_never_touched(tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("ten years of work")
    assert_refused(tmp_path, tmp_path, "not of a run", overwrite_output_dir=overwrite)
    assert_refused(tmp_path, tmp_path / "thesis.tex", "is a file", overwrite_output_dir=overwrite)


def test_existing_run_is_refused_or_overwritten(tmp_path):
    prepare(tmp_path)
    checkpoint(tmp_path, 3)
    assert_refused(tmp_path, tmp_path, "--overwrite_output_dir.*--resume_from_checkpoint latest")
    assert prepare(tmp_path, overwrite_output_dir=True, seed=8) is None
    assert files(tmp_path) == ["run.json"]
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 8


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "metrics.json", "thesis.tex"])
def test_a_result_whose_checkpoints_were_removed_is_not_deleted_unasked(tmp_path, name):
    prepare(tmp_path)
    (tmp_path / name).write_text("hours of work")
    assert_refused(tmp_path, tmp_path, "--overwrite_output_dir")


def test_a_run_that_ended_before_its_first_checkpoint_can_begin_again(tmp_path):
    prepare(tmp_path)
    (tmp_path / "train_log.jsonl").write_text("{}")
    (tmp_path / "contributions.json").write_text("{}")
    assert prepare(tmp_path) is None
    assert files(tmp_path) == ["run.json"]


def test_resume_finds_the_latest_or_the_named_checkpoint(tmp_path):
    prepare(tmp_path)
    nine, ten = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    assert prepare(tmp_path, resume_from_checkpoint="latest") == ten
    assert prepare(tmp_path, resume_from_checkpoint=str(nine)) == nine
    assert prepare(tmp_path, resume_from_checkpoint="checkpoint-9") == nine


def test_one_command_begins_a_run_and_begins_it_again(tmp_path, capsys):
    folder = tmp_path / "new"
    for _ in range(2):
        assert prepare(folder, resume_from_checkpoint="latest") is None
        assert files(folder) == ["run.json"] and "the run begins" in capsys.readouterr().out
    path = checkpoint(folder, 3)
    assert prepare(folder, resume_from_checkpoint="latest") == path


def test_resuming_never_deletes_a_result_whose_checkpoints_were_removed(tmp_path):
    prepare(tmp_path)
    (tmp_path / "metrics.json").write_text("hours of work")
    assert_refused(tmp_path, tmp_path, "holds files but no checkpoint", resume_from_checkpoint="latest")


def test_resume_without_the_named_checkpoint_creates_nothing(tmp_path):
    assert_refused(tmp_path, tmp_path / "none", "no readable checkpoint", resume_from_checkpoint="checkpoint-7")


def test_run_goes_on_in_its_own_folder(tmp_path):
    path = checkpoint(tmp_path, 3)
    remedy = f"--output_dir {tmp_path}"
    assert_refused(tmp_path, tmp_path / "other", remedy, resume_from_checkpoint=str(path))
    flags = {"resume_from_checkpoint": "latest", "overwrite_output_dir": True}
    assert_refused(tmp_path, tmp_path, "exclude each other", **flags)


@pytest.mark.parametrize(
    "changed",
    [{"seed": 1}, {"learning_rate": 0.2}, {"max_train_steps": 8}, {"resolution": 16}, {"max_grad_norm": 2.0}]
    + [{"checkerboard_weight": 5.0}]
    + [{"use_ema": True}, {"ema_decay": 0.5}],
)
def test_resume_with_other_settings_names_the_flag(tmp_path, changed):
    checkpoint(tmp_path, 3)
    (flag,) = changed
    assert_refused(tmp_path, tmp_path, f"--{flag} was", resume_from_checkpoint="latest", **changed)


def test_a_checkpoint_from_before_the_loss_on_checkerboards_goes_on_without_it(tmp_path):
    path = checkpoint(tmp_path, 3, kind=FinetuneArguments)
    state = json.loads((path / "trainer_state.json").read_text())
    del state["arguments"]["checkerboard_weight"]
    (path / "trainer_state.json").write_text(json.dumps(state))
    flags = {"kind": FinetuneArguments, "resume_from_checkpoint": "latest"}
    assert_refused(tmp_path, tmp_path, "--checkerboard_weight was 0.0, now 5.0", **flags)
    assert prepare(tmp_path, checkerboard_weight=0.0, **flags) == path


STABLE = {"lr_scheduler": "warmup_stable_decay", "lr_decay_steps": 4}  # of the 9 steps the first 5 are at the peak


@pytest.mark.parametrize(
    "changed",
    [{"max_train_steps": 20}, {"max_train_steps": 20, "lr_decay_steps": 8}, {"lr_decay_steps": 0}]
    + [{"max_train_steps": 8}],
)
def test_before_its_learning_rate_falls_a_run_may_be_prolonged_or_shortened(tmp_path, changed):
    path = checkpoint(tmp_path, 4, **STABLE)
    assert prepare(tmp_path, resume_from_checkpoint="latest", **(STABLE | changed)) == path


@pytest.mark.parametrize(
    ("step", "changed"),
    [(6, {"max_train_steps": 8}), (5, {"max_train_steps": 8}), (5, {"lr_decay_steps": 5})]
    + [(4, {"max_train_steps": 20, "seed": 1}), (4, {"lr_scheduler": "cosine", "lr_decay_steps": 0})],
)
def test_once_the_learning_rate_falls_a_run_gets_no_shorter_and_keeps_other_settings_always(tmp_path, step, changed):
    checkpoint(tmp_path, step, **STABLE)
    flag = list(changed)[-1] if "seed" in changed else list(changed)[0]
    assert_refused(tmp_path, tmp_path, f"--{flag} was", resume_from_checkpoint="latest", **(STABLE | changed))


@pytest.mark.parametrize("schedule", [{}, STABLE])
@pytest.mark.parametrize("step", [3, 9])
def test_a_run_may_always_be_prolonged(tmp_path, schedule, step):
    path = checkpoint(tmp_path, step, **schedule)
    assert prepare(tmp_path, resume_from_checkpoint="latest", **(schedule | {"max_train_steps": 10})) == path


def test_resume_may_change_what_does_not_change_the_result(tmp_path):
    path = checkpoint(tmp_path, 3)
    free = {"checkpointing_steps": 7, "checkpoints_total_limit": 0, "dataloader_num_workers": 1}
    free |= {"gradient_accumulation_steps": 2, "validation_steps": 3, "report_to": "tensorboard"}
    assert prepare(tmp_path, resume_from_checkpoint="latest", per_device_train_batch_size=1, **free) == path


def test_data_may_have_moved_where_the_images_themselves_are_compared(tmp_path):
    path = checkpoint(tmp_path, 3, kind=PretrainArguments, train_dir="here")
    flags = {"kind": PretrainArguments, "resume_from_checkpoint": "latest", "train_dir": "there"}
    with pytest.raises(ValueError, match="--train_dir was 'here', now 'there'"):
        prepare(tmp_path, **flags)
    state = json.loads((path / "trainer_state.json").read_text())
    for known in ({"dataset": "5 clean pictures, 12ab"}, {"dataset": "a stream", "positions": [0]}):
        (path / "trainer_state.json").write_text(json.dumps(state | known))
        if "positions" not in known:
            assert prepare(tmp_path, **flags) == path
            continue
        with pytest.raises(ValueError, match="--train_dir was"):
            prepare(tmp_path, **flags)


def test_how_the_result_is_saved_and_watched_may_change(tmp_path):
    sizes = {"kind": PretrainArguments, "train_dir": "here", "resolution": 16}
    path = checkpoint(tmp_path, 3, **sizes)
    state = json.loads((path / "trainer_state.json").read_text()) | {"dataset": "5 clean pictures, 12ab"}
    (path / "trainer_state.json").write_text(json.dumps(state))
    free = {"eval_dir": "there", "validation_steps": 2, "data_card": "mine", "half_precision_weights": True}
    assert prepare(tmp_path, resume_from_checkpoint="latest", **sizes, **free) == path


def test_two_runs_cannot_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LOCK_SECONDS", 0.1)
    prepare(tmp_path)
    checkpoint(tmp_path, 3)
    args = arguments(tmp_path, resume_from_checkpoint="latest")
    with open_output_dir(args, Accelerator(cpu=True), check_output_dir(args)):
        for flags in ({"overwrite_output_dir": True}, {"resume_from_checkpoint": "latest"}):
            assert_refused(tmp_path, tmp_path, "Another run is writing into", **flags)
    assert prepare(tmp_path, overwrite_output_dir=True) is None


@pytest.mark.parametrize("before", [None, 3])
def test_a_run_that_ended_meanwhile_is_neither_deleted_nor_overtaken(tmp_path, before):
    """It ended while this one read its data, or waited for it."""
    prepare(tmp_path)
    if before is not None:
        checkpoint(tmp_path, before)
    args = arguments(tmp_path, resume_from_checkpoint="latest")
    seen = check_output_dir(args)
    checkpoint(tmp_path, 5)
    with pytest.raises(ValueError, match="has just written into .* call this one again"):
        with open_output_dir(args, Accelerator(cpu=True), seen):
            pass
    assert prepare(tmp_path, resume_from_checkpoint="latest").name == "checkpoint-5"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_pointed_out_and_used(tmp_path, monkeypatch, number):
    def refuse(_lock):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module.FileLock, "acquire", refuse)
    with pytest.warns(UserWarning, match="cannot be locked on this file system"):
        assert prepare(tmp_path) is None
    assert files(tmp_path) == ["run.json"]


def test_a_folder_that_is_a_link_is_emptied_and_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    prepare(tmp_path / "out")
    checkpoint(tmp_path / "out", 3)
    assert prepare(tmp_path / "out", overwrite_output_dir=True) is None
    assert files(tmp_path / "disk") == ["run.json"] and (tmp_path / "out").is_symlink()


def test_what_a_run_reads_is_not_deleted(tmp_path):
    prepare(tmp_path)
    (tmp_path / "photos").mkdir()
    flags = {"kind": PretrainArguments, "train_dir": str(tmp_path / "photos"), "overwrite_output_dir": True}
    assert_refused(tmp_path, tmp_path, "--train_dir .* lies in --output_dir", **flags)


def test_checkpoint_older_than_a_flag_can_be_resumed(tmp_path):
    path = checkpoint(tmp_path, 3)
    assert prepare(tmp_path, kind=NewerArguments, resume_from_checkpoint="latest") == path


def test_flag_newer_than_the_checkpoint_had_its_default(tmp_path):
    checkpoint(tmp_path, 3)
    with pytest.raises(ValueError, match="--invented_later was 3, now 4"):
        check_output_dir(arguments(tmp_path, NewerArguments, resume_from_checkpoint="latest", invented_later=4))


def test_run_killed_before_its_settings_were_written_can_begin_again(tmp_path):
    (tmp_path / ".run.json.partial").write_text('{"see')
    prepare(tmp_path)
    assert files(tmp_path) == ["run.json"]


def test_checkpoint_of_something_else_is_refused(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text('{"step": 3}')
    assert_refused(tmp_path, tmp_path, "no checkpoint of a training run", resume_from_checkpoint="latest")
