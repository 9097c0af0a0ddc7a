"""A task speaks about its pairs before a run begins."""

from types import SimpleNamespace

from PIL import Image
from support.icc import srgb

from colora_peft.training import load_pairs
from colora_peft.training.task import TaskArguments


def test_pairs_whose_profiles_differ_are_pointed_out_once_for_each_folder(tmp_path, monkeypatch):
    for part in ("train", "test"):
        for side in ("input", "target"):
            (tmp_path / part / side).mkdir(parents=True)
            for name in "ab":
                Image.new("RGB", (16, 16)).save(tmp_path / part / side / f"{name}.png", icc_profile=srgb())
    printed = []
    accelerator = SimpleNamespace(print=printed.append)
    args = TaskArguments("unused", train_dir=str(tmp_path / "train"), eval_dir=str(tmp_path / "test"), resolution=16)
    load_pairs(args, accelerator, "")
    assert not printed
    monkeypatch.setattr("colora_peft.data.profiles.describe_same_colours", lambda *profiles: False)
    load_pairs(args, accelerator, "")
    assert [line[: line.index(" (")] for line in printed] == [
        "Note: the colour profiles of input and target differ in 2 of 2 pairs"
    ] * 2
