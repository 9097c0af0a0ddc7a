"""The measurement of PROD's speed, launched on the smallest settings, and the library that it compares with."""

import json
import re
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from support.experiments import launch

from colora_peft.prod import JPEG, RandomOrderDegradation
from examples.experiments.prod_speed import run as prod_speed
from examples.experiments.prod_speed.library import library_transforms

NAMES = ["mix", "blur", "noise", "rain", "jpeg", "motion"]


def test_every_turn_has_draws_of_its_own_and_each_run_the_same():
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


@dataclass(frozen=True)
class Darken(JPEG):
    """A sixth degradation, for which the library has nothing."""

    name: ClassVar[str] = "darken"


def test_a_degradation_that_the_library_has_not_is_measured_alone(monkeypatch):
    monkeypatch.setattr(prod_speed, "default_degradations", lambda: (JPEG(), Darken()))
    monkeypatch.setattr(prod_speed, "library_transforms", lambda plain_noise: {"jpeg": lambda image: image})
    monkeypatch.setattr(prod_speed, "RandomOrderDegradation", lambda: RandomOrderDegradation((JPEG(), Darken())))
    args = prod_speed.ProdSpeedArguments(patches=1, rounds=1)
    rows = list(prod_speed.speeds(args, [torch.rand(3, 32, 32)]))
    assert {row["degradation"]: len(row["times_as_fast_as"]) for row in rows} == {"mix": 0, "jpeg": 2, "darken": 0}
    memory = {"patches": 1, "after_warm_up_mb": 1.0, "peak_mb": 1.0, "at_the_end_mb": 1.0}
    table = prod_speed.report({"rows": rows, "memory": memory, "threads": 1})
    assert re.search(r"\| darken \| [\d,]+ +\| - +\| - +\| - +\| - +\|", table)
    assert re.search(r"\| jpeg +(\| [\d,]+ +){3}(\| [\d.]+x +){2}\|", table)


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
