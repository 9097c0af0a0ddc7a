"""Parts that all grids share: splits of pairs, the file of cells, and shares of the work."""

import pytest
from support.examples import write_pairs

from examples.experiments.grid import cells as grid_cells


@pytest.mark.parametrize("validation", ["block", "drawn"])
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
    assert len(seen) == {"block": 9, "drawn": len(seen)}[validation] and len(seen) >= 3


def test_file_keeps_what_was_run_and_finds_it_by_its_settings(tmp_path):
    file = grid_cells.CellFile(tmp_path / "new" / "cells.json")
    assert file.find({"seed": 0}) is None
    file.add({"seed": 0, "rate": 0.1, "psnr": 20.0})
    file.add({"seed": 1, "rate": 0.1, "failed": "The loss is nan."})
    found = grid_cells.CellFile(file.path)
    assert found.cells == file.cells
    assert found.find({"seed": 1, "rate": 0.1})["failed"] and found.find({"seed": 1, "rate": 0.2}) is None


def test_two_processes_lose_no_cell_of_each_other(tmp_path):
    one, other = (grid_cells.CellFile(tmp_path / "cells.json") for _ in range(2))
    one.add({"of": "one"})
    assert other.find({"of": "one"}) == {"of": "one"}
    other.add({"of": "other"})
    one.add({"of": "one again"})
    assert len(grid_cells.CellFile(one.path).cells) == 3


def test_a_network_that_must_be_made_first_is_refused_with_the_page_of_its_command(tmp_path):
    path = str(tmp_path / "nafnet-small-prod-v1")
    for ask in (grid_cells.network_fingerprint, lambda path: grid_cells.load_network(path, None)):
        with pytest.raises(FileNotFoundError, match="not shipped: make it .*networks/nafnet-small-prod-v1/README.md"):
            ask(path)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_parts_share_the_grid(count):
    grid = list(range(5))
    parts = [grid_cells.own_part(grid, f"{first}/{count}") for first in range(count)]
    assert sorted(sum(parts, [])) == grid


@pytest.mark.parametrize("part", ["2/2", "1", "a/b", "0/0", "-1/2"])
def test_a_part_that_is_none_is_named(part):
    with pytest.raises(ValueError, match=f"The part is '{part}'"):
        grid_cells.own_part([1], part)
