"""Kills and resumes: a shortened run, and the checks that would notice a difference."""

import json

import pytest
import torch
from safetensors.torch import save_file

from examples.experiments.resume import run as resume


@pytest.mark.slow
def test_three_kills_change_nothing(tmp_path):
    args = resume.KillArguments(output_dir=str(tmp_path / "out"), num_kills=3)
    resume.main(args)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["kills"]) == 3 and report["left"] == []
    assert set(map(len, report["different_tensors"].values())) == {0}
    # Mid-epoch (16 images, 2 a step, a checkpoint every 3 steps) and past the first one.
    assert report["kills"][-1]["last_checkpoint"] > 8


def test_tensors_that_differ_in_one_bit_or_are_missing_are_named(tmp_path):
    one = {"same": torch.ones(2), "bit": torch.ones(2), "gone": torch.ones(1)}
    other = {"same": torch.ones(2), "bit": torch.tensor([1.0, 1 + 2**-23]), "new": torch.ones(1)}
    save_file(one, tmp_path / "one")
    save_file(other, tmp_path / "other")
    assert resume.differing_tensors(tmp_path / "one", tmp_path / "other") == ["bit", "gone", "new"]
    assert resume.differing_tensors(tmp_path / "one", tmp_path / "one") == []


def test_half_a_checkpoint_is_noticed(tmp_path):
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text('{"step": 3}')
    for name in ("model", "optimizer", "ema"):
        save_file({"a": torch.ones(100)}, checkpoint / f"{name}.safetensors")
    resume.check_checkpoints(tmp_path)
    content = (checkpoint / "ema.safetensors").read_bytes()
    (checkpoint / "ema.safetensors").write_bytes(content[:-1])
    with pytest.raises(ValueError, match="ema.safetensors cannot be read"):
        resume.check_checkpoints(tmp_path)


def test_existing_folder_is_refused(tmp_path):
    (tmp_path / "precious").write_text("")
    with pytest.raises(ValueError, match="choose a new folder"):
        resume.main(resume.KillArguments(output_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="--num_kills must be at least 1"):
        resume.KillArguments(num_kills=0)
