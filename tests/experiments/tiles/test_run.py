"""The measurement of tiles: its choices and rows, then the script launched on a tiny network."""

import json

import pytest
from support.experiments import launch

from colora_peft.evaluation.metrics import PSNR_CAP_DB
from examples.experiments.tiles import run as tiles


def test_every_choice_is_compared_with_an_untiled_one_before_it():
    args = tiles.TilesArguments(tiles=["64/16"], statistics_passes=[1, 2], pooling_windows=[96])
    settings = [chosen for _, chosen in tiles.choices(args)]
    assert [chosen["tile"] for chosen in settings] == [None, None, 64, 64, 64, 64]
    windows = [chosen.get("pooling_window") for chosen in settings]
    assert windows == [None, 96, None, None, None, 96]
    with pytest.raises(ValueError, match="--tiles takes two numbers as in 512/64, got '64'"):
        list(tiles.choices(tiles.TilesArguments(tiles=["64"])))


def test_rows_hold_the_laws_of_what_they_compare(tiny_nafnet, eval_dir):
    args = tiles.TilesArguments(
        model_name_or_path=str(tiny_nafnet), tiles=["32/16", "48/16"], statistics_passes=[1], pooling_windows=[16]
    )
    first, rows = tiles.measure(tiles.load(str(tiny_nafnet), None), str(eval_dir), args)
    assert (first[0]["pictures"], rows[0]["pictures"]) == (1, 2)
    by_choice = {(row["tile"], row["pooling"]): row for row in rows}
    # Untiled, or in one tile: the same image. The rest differs.
    for choice in ((None, "picture"), (48, "tile"), (48, "picture")):
        assert by_choice[choice]["lowest_psnr_to_untiled"] == PSNR_CAP_DB
        assert by_choice[choice]["psnr_to_target_less_untiled"] == 0
    assert by_choice[48, "local"]["psnr_to_untiled_of_same_pooling"] == PSNR_CAP_DB
    for choice in ((32, "tile"), (32, "picture"), (32, "local"), (None, "local")):
        row = by_choice[choice]
        assert row["lowest_psnr_to_untiled"] <= row["psnr_to_untiled"] < PSNR_CAP_DB
    lines = tiles.table(rows).splitlines()
    assert len(lines) == len(rows) + 2 and len({line.count("|") for line in lines}) == 1


@pytest.mark.slow
def test_launched_it_writes_tables_and_measures_memory(tiny_nafnet, eval_dir, tmp_path):
    common = ("--model_name_or_path", tiny_nafnet, "--output_dir", tmp_path)
    done = launch(
        "tiles.run",
        *common,
        "--data",
        eval_dir,
        "--tiles",
        "32/16",
        "--statistics_passes",
        1,
        "--pooling_windows",
        "-1",
    )
    assert done.returncode == 0, done.stderr
    (rows,) = json.loads((tmp_path / "tiles.json").read_text())["results"].values()
    assert [row["pooling"] for row in rows] == ["picture", "tile", "picture"]
    assert "| 32 / 16 | picture, 1 pass |" in (tmp_path / "tiles.md").read_text()
    done = launch("tiles.run", *common, "--memory", "1500x900", "--memory_pooling", "tile")
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "tiles-memory-1500x900.json").read_text())
    assert row["picture_and_result_bytes"] == 2 * 3 * 4 * 1500 * 900
    # The image lies there when the peak is reached; of a tile of the tiny network there are some dozens of MB.
    assert 0 < row["peak_bytes"] - row["peak_bytes_before_the_picture"] - row["picture_and_result_bytes"] < 1e9


def test_an_impossible_size_is_refused_before_anything_is_made(tmp_path):
    args = tiles.TilesArguments(memory="large", output_dir=str(tmp_path / "results"))
    with pytest.raises(ValueError, match="--memory takes two numbers as in 512x64, got 'large'"):
        tiles.main(args)
    assert not (tmp_path / "results").exists()
