"""What the grids of examples/ share: splits, the file of cells, and the scripts over it launched on tiny pairs."""

import json
import math
import subprocess
import sys

import pytest
from support.examples import EXAMPLES, load_example, write_pairs

grid_cells = load_example("grid_cells")


@pytest.mark.parametrize("validation", ["block", "colours", "drawn"])
def test_pairs_to_train_on_and_to_validate_on_are_disjoint_and_repeatable(tmp_path, validation):
    folder = write_pairs(tmp_path / "pairs", 9)
    blocks = []
    for seed in (0, 1, 2):
        train, held_out = grid_cells.split_pairs(folder, 4, 3, seed, validation)
        again = grid_cells.split_pairs(folder, 4, 3, seed, validation)
        assert (train.names, held_out.names) == tuple(pairs.names for pairs in again)
        assert len(set(train.names)) == 4 and len(held_out) == 3 and not set(train.names) & set(held_out.names)
        blocks.append(held_out.names)
    seen = {name for block in blocks for name in block}
    assert len(seen) == {"block": 9, "colours": 3, "drawn": len(seen)}[validation] and len(seen) >= 3


def test_file_keeps_what_was_run_and_finds_it_by_its_settings(tmp_path):
    file = grid_cells.CellFile(tmp_path / "new" / "cells.json")
    assert file.find({"seed": 0}) is None
    file.add({"seed": 0, "rate": 0.1, "psnr": 20.0})
    file.add({"seed": 1, "rate": 0.1, "failed": "The loss is nan."})
    found = grid_cells.CellFile(file.path)
    assert found.cells == file.cells
    assert found.find({"seed": 1, "rate": 0.1})["failed"] and found.find({"seed": 1, "rate": 0.2}) is None


def test_what_another_process_has_added_is_found(tmp_path):
    one, other = (grid_cells.CellFile(tmp_path / "cells.json") for _ in range(2))
    one.add({"seed": 0})
    assert other.find({"seed": 0}) == {"seed": 0}
    other.add({"seed": 1})
    assert len(grid_cells.CellFile(one.path).cells) == 2


def test_launched_search_adds_what_its_file_lacks(tmp_path):
    folder, results = write_pairs(tmp_path / "swapped" / "train", 6), tmp_path / "rates.json"
    command = [sys.executable, str(EXAMPLES / "search_learning_rates.py"), "--train_dir", str(folder), "--results",
               str(results), "--train_pairs", "3", "--validation_pairs", "2", "--seeds", "0", "--max_train_steps", "2",
               "--resolution", "32", "--per_device_train_batch_size", "1", "--methods", "colora", "full"]  # fmt: skip
    for rates in (["1e-3"], ["1e-3", "3e-3"]):
        done = subprocess.run([*command, "--learning_rates", *rates], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    cells = json.loads(results.read_text())
    assert [(cell["method"], cell["learning_rate"]) for cell in cells] == [
        ("colora", 1e-3),
        ("full", 1e-3),
        ("colora", 3e-3),
        ("full", 3e-3),
    ]
    assert all(math.isfinite(cell["psnr"]) for cell in cells)
    table = results.with_suffix(".md").read_text()
    assert table in done.stdout and f"{cells[0]['psnr']:.2f} (1)" in table and table.count("**") == 4


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_parts_share_the_grid(count):
    grid = list(range(5))
    parts = [grid_cells.own_part(grid, f"{first}/{count}") for first in range(count)]
    assert sorted(sum(parts, [])) == grid


@pytest.mark.parametrize("part", ["2/2", "1", "a/b", "0/0", "-1/2"])
def test_a_part_that_is_none_is_named(part):
    with pytest.raises(ValueError, match=f"The part is '{part}'"):
        grid_cells.own_part([1], part)


def test_two_processes_lose_no_cell_of_each_other(tmp_path):
    one, other = (grid_cells.CellFile(tmp_path / "cells.json") for _ in range(2))
    for number in range(3):
        one.add({"of": "one", "number": number})
        other.add({"of": "other", "number": number})
    assert len(grid_cells.CellFile(one.path).cells) == 6
