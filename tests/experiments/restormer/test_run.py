"""The measurement of Restormer: its variants are the same function, then the script launched on a tiny network."""

import json

import pytest
import torch
from support.experiments import launch

from examples.experiments.restormer import run as restormer
from examples.experiments.speed.variants import Mode


def test_variants_are_the_same_function_and_keep_more_and_more():
    x = torch.rand(1, 3, 24, 16)
    networks = [restormer.make_network(name, 8, [1, 1, 1, 1]) for name in restormer.VARIANTS]
    with torch.no_grad():
        frugal, *others = (network(x).reconstruction for network in networks)
    for other in others:
        torch.testing.assert_close(frugal, other, rtol=0, atol=1e-5)
    args = restormer.RestormerArguments(width=8, num_blocks=[1, 1, 1, 1])
    mode = Mode("cpu")
    kept = [restormer.kept_bytes(args, mode, "2x64", name) for name in restormer.VARIANTS]
    assert kept[0] < 0.9 * kept[1] < 0.9 * kept[2]


@pytest.mark.slow
def test_launched_benchmark_writes_every_row(tmp_path):
    done = launch("restormer.run", "--shapes", "1x16", "--width", 8, "--num_blocks", 1, 1, 1, 1, "--rounds", 1,
                  "--memory_repeats", 1, "--output_dir", tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (results,) = tmp_path.glob("*.json")
    rows = json.loads(results.read_text())["rows"]
    assert {row["what"] for row in rows} == {
        "training step", "peak memory of a training step", "kept for the backward pass"}  # fmt: skip
    assert all(row.get("seconds", row.get("bytes")) > 0 for row in rows)
    assert all(row["ratio"] == 1 for row in rows if row["variant"] == "straightforward")
    assert len(results.with_suffix(".md").read_text().splitlines()) == len(rows) + 4
