"""Image columns of Hugging Face datasets: what is refused, what is read again, and what a digest follows."""

import os
import time

import datasets
import fsspec
import pytest
import torch
from support.pairs import dataset_of, kinds, save

from colora_peft.data.hub_columns import HubImages, read_cell
from colora_peft.data.sources import check_images, first_usable
from colora_peft.images import as_float, list_images, read_image


def test_a_dataset_that_does_not_fit_is_refused(tmp_path):
    rows = dataset_of(kinds(tmp_path))
    with pytest.raises(ValueError, match=r"none is called image; name it by --image_column"):
        HubImages(rows, "image")
    with pytest.raises(ValueError, match="`label` holds Value.*not images"):
        HubImages(rows, "label")
    with pytest.raises(ValueError, match="split is empty"):
        HubImages(rows.select([]), "photo")
    with pytest.raises(ValueError, match="^Of 5 images 5 cannot be used. row 0 is 16x16 pixels, smaller"):
        check_images(HubImages(rows, "photo"), 17)


# Addresses


class Flaky(fsspec.AbstractFileSystem):
    """Raises what `failures` holds, one after another, before it gives the file."""

    protocol, cachable = "flaky", False
    failures, content = [], b""

    def cat_file(self, path, **_):
        if Flaky.failures:
            raise Flaky.failures.pop(0)
        return Flaky.content


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A cell of an address, the pauses made in reading it, and the image behind it."""
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    path, pauses = save(tmp_path / "a.png"), []
    Flaky.content, Flaky.failures = path.read_bytes(), []
    monkeypatch.setattr(time, "sleep", pauses.append)
    return {"bytes": None, "path": "flaky://host/a.png"}, pauses, read_image(path)


class OfTheClient(Exception):
    """As the errors of aiohttp, no OSError."""


@pytest.mark.parametrize("failures", [[], [TimeoutError()], [OfTheClient("503"), ConnectionResetError()]])
def test_a_server_that_comes_back_gives_the_image(server, failures):
    cell, pauses, expected = server
    Flaky.failures = [*failures]
    assert torch.equal(as_float(read_cell(cell, "row 3")), expected)
    assert pauses == [1, 4][: len(failures)]


@pytest.mark.parametrize("failure", [TimeoutError(), OfTheClient("503"), PermissionError("no"), ValueError("no json")])
def test_a_server_that_stays_away_stops_the_run_and_no_other_image_is_taken(server, failure):
    cell, pauses, expected = server
    Flaky.failures = [failure] * 3
    with pytest.raises(ConnectionError, match=r"a\.png of row 3 cannot be read .*, tried 3 times; resume the run"):
        first_usable([("row 3", lambda: read_cell(cell, "row 3")), ("row 4", lambda: expected)], 1)
    assert pauses == [1, 4]


def test_what_is_gone_or_damaged_for_good_is_a_bad_image(server):
    cell, pauses, expected = server
    Flaky.failures = [FileNotFoundError("404")]
    other = ("row 4", lambda: expected)
    _, name, reasons = first_usable([("row 3", lambda: read_cell(cell, "row 3")), other], 1)
    assert name == "row 4" and "a.png of row 3 is not there" in reasons[0]
    Flaky.content = b"<html>"
    with pytest.raises(ValueError, match=r"a\.png cannot be read as an image"):
        read_cell(cell, "row 3")
    assert pauses == []


@pytest.mark.parametrize("cell", [None, {"bytes": None, "path": None}])
def test_an_empty_cell_is_a_missing_image(cell):
    with pytest.raises(ValueError, match="image of row 3 is missing"):
        read_cell(cell, "row 3")


# Digests


def test_a_digest_of_a_dataset_follows_its_images_and_not_the_date(tmp_path):
    file = tmp_path / "photos.parquet"
    dataset_of(kinds(tmp_path / "kinds")).to_parquet(file)

    def digest(rows=None):
        options = {"data_files": str(file), "split": "train", "cache_dir": str(tmp_path / "cache")}
        split = datasets.load_dataset("parquet", **options)
        return HubImages(split if rows is None else split.select(rows), "photo").digest

    before = digest()
    os.utime(file, (1, 1))
    assert digest() == before == digest([0, 1, 2, 3, 4])
    assert len({before, digest([1, 0, 2, 3, 4]), digest([0, 1, 2, 3])}) == 3


def test_a_digest_of_images_that_a_dataset_only_names_follows_their_sizes(tmp_path):
    paths = list_images(kinds(tmp_path / "kinds"))

    def digest():
        column = datasets.Dataset.from_dict({"photo": [str(path) for path in paths]})
        return HubImages(column.cast_column("photo", datasets.Image()), "photo").digest

    before = digest()
    save(paths[1], 20, 20)
    assert digest() != before


def test_a_digest_follows_the_rows_of_a_dataset(tmp_path):
    rows = dataset_of(kinds(tmp_path))
    whole, again, fewer = (HubImages(each, "photo").digest for each in (rows, rows, rows.select([0, 2])))
    assert whole == again != fewer and fewer.startswith("2 clean pictures, ")
