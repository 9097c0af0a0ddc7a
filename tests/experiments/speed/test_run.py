"""examples/benchmark_speed.py: how it measures, then the script launched on the smallest shapes."""

import json
import subprocess
import sys

import pytest
from support.examples import EXAMPLES, load_example

benchmark_speed = load_example("benchmark_speed")


def test_each_round_runs_all_in_turns_and_the_first_does_not_count():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = benchmark_speed.take_turns(runs, 3, lambda: None)
    assert "".join(calls) == "cba" + "abc" + "cba" + "abc"
    assert {name: len(own) for name, own in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_table_shows_amounts_and_ratios():
    rows = [
        {"network": "cnn", "what": "inference", "variant": "lora", "seconds": 0.0125, "ratio_to_bare": 1.25,
         "ratio_to_lora": 1.0},
        {"network": "cnn", "what": "disk, 1 tasks", "variant": "full", "bytes": 2_500_000, "ratio_to_full": 1.0},
    ]  # fmt: skip
    lines = benchmark_speed.table(rows).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert "| 12.5 ms | 1.250 | 1.000 |" in lines[2] and "| 2.5 MB | 1.000 |  |" in lines[3]


@pytest.mark.slow
def test_launched_benchmark_writes_every_row(tmp_path):
    command = [sys.executable, str(EXAMPLES / "benchmark_speed.py"), "--networks", "cnn", "--train_shapes", "1x16",
               "--inference_shapes", "1x16", "--rounds", "1", "--repeats", "1", "--memory_repeats", "1",
               "--output_dir", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (results,) = tmp_path.glob("*.json")
    rows = json.loads(results.read_text())["rows"]
    kinds = {row["what"] for row in rows}
    assert kinds >= {"training step", "inference", "peak memory of a training step", "hotswap_adapter, prepared"}
    assert all(row.get("seconds", row.get("bytes")) > 0 for row in rows)
    steps = {row["variant"]: row for row in rows if row["what"] == "training step"}
    assert steps["full"]["ratio_to_full"] == 1 and steps["lora"]["ratio_to_lora"] == 1
    assert len(results.with_suffix(".md").read_text().splitlines()) == len(rows) + 4
