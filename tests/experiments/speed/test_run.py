"""The measurement of speed: its table, then the scripts launched on the smallest shapes."""

import json

import pytest
from support.experiments import launch

from examples.experiments.speed import run as speed


def test_lines_show_amounts_and_ratios():
    step = {"network": "cnn", "what": "inference", "variant": "lora", "seconds": 0.0125, "ratio_to_bare": 1.25,
            "ratio_to_lora": 1.0}  # fmt: skip
    assert speed.line(step) == ["cnn", "", "inference", "", "lora", "12.5 ms", "1.250", "1.000"]
    disk = {"network": "cnn", "what": "disk, 1 tasks", "variant": "full", "bytes": 2_500_000, "ratio_to_full": 1.0}
    assert speed.line(disk)[-3:] == ["2.5 MB", "1.000", ""]


@pytest.mark.slow
def test_launched_measurement_writes_every_row(tmp_path):
    done = launch("speed.run", "--networks", "cnn", "--train_shapes", "1x16", "--inference_shapes", "1x16",
                  "--rounds", 1, "--repeats", 1, "--memory_repeats", 1, "--output_dir", tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (results,) = tmp_path.glob("*.json")
    rows = json.loads(results.read_text())["rows"]
    assert {row["what"] for row in rows} == {"training step", "inference", "peak memory of a training step"}
    assert all(row.get("seconds", row.get("bytes")) > 0 for row in rows)
    steps = {row["variant"]: row for row in rows if row["what"] == "training step"}
    assert steps["full"]["ratio_to_full"] == 1 and steps["lora"]["ratio_to_lora"] == 1
    assert len(results.with_suffix(".md").read_text().splitlines()) == len(rows) + 4


@pytest.mark.slow
def test_launched_measurement_of_factors_writes_a_line_for_each_layer(tmp_path):
    flags = ("--channels", 8, "--sides", 4, "--rounds", 1, "--output_dir", tmp_path)
    done = launch("speed.factors", *flags)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "factors.md").read_text().splitlines()) == 2 + 2 + 3
