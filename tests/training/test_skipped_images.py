"""Skipped images: counted over all samples, listed once each, too many an error that leaves a checkpoint."""

import json

import pytest
from support.loop import Killed, NoisyPatches, assert_equal, nafnet, rows, run

from colora_peft.training.skipped_images import SKIPPED_LOG, SkippedImages, TooManySkipped


class SomeBad(NoisyPatches):
    """The images of some indices are met as bad ones are; at `dies_at` the run is killed."""

    def __init__(self, bad=(), share=1.0, dies_at=None):
        super().__init__()
        self.bad, self.max_skipped_share, self.dies_at = bad, share, dies_at

    def __getitem__(self, number):
        if number == self.dies_at:
            raise Killed
        index = self.locate(number)[1]
        return {**super().__getitem__(number), "skipped": [f"{index}.png is bad."] if index in self.bad else []}


def state(folder, step):
    return json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())


def test_each_is_listed_once_and_all_samples_count_also_after_a_resume(tmp_path):
    expected = run(tmp_path / "whole", nafnet(), SomeBad([1, 3]), max_train_steps=10)
    assert state(tmp_path / "whole", 10)["skipped"] == 8  # 20 samples are four epochs of five images
    listed = rows(tmp_path / "whole", SKIPPED_LOG)
    assert sorted(row["reason"] for row in listed) == ["1.png is bad.", "3.png is bad."]
    assert all(1 <= row["step"] <= 3 for row in listed)
    flags = {"max_train_steps": 10, "checkpointing_steps": 2}
    with pytest.raises(Killed):
        run(tmp_path / "parts", nafnet(), SomeBad([1, 3], dies_at=7), **flags)
    resumed = run(tmp_path / "parts", nafnet(), SomeBad([1, 3]), resume_from_checkpoint="latest", **flags)
    assert_equal(resumed, expected)
    assert state(tmp_path / "parts", 10)["skipped"] == 8
    assert rows(tmp_path / "parts", SKIPPED_LOG) == listed


def test_a_clean_run_leaves_no_list(tmp_path):
    run(tmp_path, nafnet(), SomeBad())
    assert not (tmp_path / SKIPPED_LOG).exists()


def test_too_many_stop_the_run_which_goes_on_with_a_larger_share(tmp_path):
    with pytest.raises(
        TooManySkipped, match=r"^2 of \d+ samples .*--max_skipped_share 0.001 .*first: 1\.png is bad\."
    ):
        run(tmp_path, nafnet(), SomeBad([1], share=0.001))
    stopped = max(int(path.name[11:]) for path in tmp_path.glob("checkpoint-*"))
    assert state(tmp_path, stopped)["skipped"] == 2 and stopped < 6
    with pytest.raises(TooManySkipped):
        run(tmp_path, nafnet(), SomeBad([1], share=0.001), resume_from_checkpoint="latest")
    resumed = run(tmp_path, nafnet(), SomeBad([1], share=0.1), resume_from_checkpoint="latest")
    assert_equal(resumed, run(tmp_path / "whole", nafnet(), SomeBad([1])))


@pytest.mark.parametrize(("skipped", "samples", "share", "stops"), [
    (10, 20, 0.01, False), (11, 20, 0.01, True), (50, 5000, 0.01, False), (51, 5000, 0.01, True), (1, 9, 0.0, True),
])  # fmt: skip
def test_the_share_is_judged_over_a_thousand_samples_at_least(tmp_path, skipped, samples, share, stops):
    images = SkippedImages(tmp_path, share, writes=False)
    images.add([f"{index}" for index in range(skipped)], step=1)
    if not stops:
        images.check(samples)
        return
    with pytest.raises(TooManySkipped, match=f"^{skipped} of {samples} "):
        images.check(samples)
    assert list(tmp_path.iterdir()) == []
