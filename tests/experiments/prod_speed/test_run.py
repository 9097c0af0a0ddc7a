"""examples/benchmark_prod.py: how it measures, then the script launched on the smallest settings."""

import json
import subprocess
import sys

import pytest
from support.examples import EXAMPLES, load_example

NAMES = ["mix", "blur", "noise", "rain", "jpeg", "motion"]


@pytest.fixture
def benchmark_prod(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return load_example("benchmark_prod")


def test_each_round_runs_all_in_turns_and_the_first_does_not_count(benchmark_prod):
    calls = []
    runs = {name: lambda turn, name=name: calls.append(f"{name}{turn}") for name in "ab"}
    seconds = benchmark_prod.take_turns(runs, 2)
    assert calls == ["b0", "a0", "a1", "b1", "b2", "a2"]
    assert {name: len(own) for name, own in seconds.items()} == {"a": 2, "b": 2}


def test_the_table_has_a_line_for_each_row(benchmark_prod):
    rows = [{"degradation": "mix", "patches_per_second_and_core": {"prod": 200.0, "library": 80.0},
             "times_as_fast_as": {"library": 2.5}}]  # fmt: skip
    assert benchmark_prod.table(rows).splitlines()[2] == "| mix | 200 | 80 | 2.50x |"


def launch(tmp_path, *flags):
    command = [sys.executable, str(EXAMPLES / "benchmark_prod.py"), "--patches", "2", "--rounds", "1",
               "--memory_patches", "10", "--resolution", "32", "--output_dir", str(tmp_path), *flags]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True)


def test_the_launched_benchmark_needs_no_library(tmp_path):
    done = launch(tmp_path, "--library", "none")
    assert done.returncode == 0, done.stderr
    (results,) = tmp_path.glob("*.json")
    rows = json.loads(results.read_text())["rows"]
    assert [row["degradation"] for row in rows] == NAMES
    assert all(row["patches_per_second_and_core"]["prod"] > 0 for row in rows)
    assert "| motion |" in results.with_suffix(".md").read_text()


def test_a_missing_library_is_named_with_its_remedy(benchmark_prod, monkeypatch):
    monkeypatch.setitem(sys.modules, "albumentations", None)
    with pytest.raises(ImportError, match=r"needs Albumentations: run `pip install.*or pass --library none"):
        benchmark_prod.library_transforms(plain_noise=False)


def test_the_library_degrades_what_it_is_given(benchmark_prod):
    pytest.importorskip("albumentations")
    patches = benchmark_prod.clean_patches(benchmark_prod.ProdBenchmarkArguments(patches=1, resolution=64))
    pixels = (patches[0].permute(1, 2, 0) * 255).round().byte().numpy().copy()
    transforms = benchmark_prod.library_transforms(plain_noise=False)
    assert set(transforms) == set(NAMES[1:])
    for transform in transforms.values():
        degraded = transform(pixels)
        assert degraded.shape == pixels.shape and degraded.dtype == pixels.dtype
        assert (degraded != pixels).any()
