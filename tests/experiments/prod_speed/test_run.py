"""The measurement of PROD's speed, launched on the smallest settings, and the library that it compares with."""

import json
import sys

import pytest
import torch
from support.experiments import launch

from examples.experiments.prod_speed import run as prod_speed
from examples.experiments.prod_speed.library import library_transforms

NAMES = ["mix", "blur", "noise", "rain", "jpeg", "motion"]


def test_every_turn_draws_anew_and_the_same_in_each_run():
    patch = torch.rand(3, 32, 32)
    drawn = []

    def run_mix(turn: int) -> None:
        drawn.append(turn)

    runs = prod_speed.in_turns(run_mix, lambda turn, name: drawn.append((turn, name)), ["rain"])
    for name in ("mix", "rain", "mix", "rain"):
        runs[name]()
    assert drawn == [0, (0, "rain"), 1, (1, "rain")]
    assert list(prod_speed.prod_runs([patch])) == NAMES


def test_a_line_has_rates_and_ratios():
    row = {"degradation": "mix", "patches_per_second_and_core": {"prod": 200.0, "library": 80.0},
           "times_as_fast_as": {"library": 2.5}}  # fmt: skip
    assert prod_speed.line(row) == ["mix", "200", "80", "2.50x"]


def test_the_launched_measurement_needs_no_library(tmp_path):
    done = launch("prod_speed.run", "--patches", 2, "--rounds", 1, "--memory_patches", 10, "--resolution", 32,
                  "--output_dir", tmp_path, "--library", "none")  # fmt: skip
    assert done.returncode == 0, done.stderr
    (results,) = tmp_path.glob("*.json")
    rows = json.loads(results.read_text())["rows"]
    assert [row["degradation"] for row in rows] == NAMES
    assert all(row["patches_per_second_and_core"]["prod"] > 0 for row in rows)
    assert "| motion |" in results.with_suffix(".md").read_text()


def test_a_missing_library_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "albumentations", None)
    with pytest.raises(ImportError, match=r"needs Albumentations: run `pip install.*or pass --library none"):
        library_transforms(plain_noise=False)


def test_the_library_degrades_what_it_is_given():
    pytest.importorskip("albumentations")
    patches = prod_speed.clean_patches(prod_speed.ProdSpeedArguments(patches=1, resolution=64))
    pixels = (patches[0].permute(1, 2, 0) * 255).round().byte().numpy().copy()
    transforms = library_transforms(plain_noise=False)
    assert set(transforms) == set(NAMES[1:])
    for transform in transforms.values():
        degraded = transform(pixels)
        assert degraded.shape == pixels.shape and degraded.dtype == pixels.dtype
        assert (degraded != pixels).any()
