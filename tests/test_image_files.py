"""Picture files come back unharmed through the cache, and every culprit is listed before a run begins."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_pairs import save

from colora_peft.images import read_image
from colora_peft.pairs import ImageFiles


def test_the_cache_returns_what_the_file_holds(tmp_path):
    paths = [save(tmp_path / f"{index}.png", seed=index) for index in range(3)]
    files = ImageFiles(paths)
    assert len(files) == 3
    first = [files[index] for index in range(3)]
    for path in paths:
        path.unlink()
    for index in (2, 0, 1):
        assert torch.equal(files[index], first[index])
        assert files[index].dtype == torch.float32


def test_what_the_cache_returned_may_be_written_to(tmp_path):
    files = ImageFiles([save(tmp_path / "a.png")])
    expected = read_image(tmp_path / "a.png")
    for _ in range(3):
        files[0].zero_()
    assert torch.equal(files[0], expected)


@pytest.mark.parametrize(("cache_bytes", "kept"), [(0, 0), (359, 0), (360, 1), (1000, 2), (10_000, 4)])
def test_the_cache_never_holds_more_than_it_may(tmp_path, cache_bytes, kept):
    paths = [save(tmp_path / f"{index}.png", seed=index) for index in range(4)]  # 10 * 12 * 3 = 360 bytes each
    files = ImageFiles(paths, cache_bytes)
    expected = [read_image(path) for path in paths]
    for _ in range(2):
        for index in range(4):
            assert torch.equal(files[index], expected[index])
    for path in paths:
        path.unlink()
    readable = 0
    for index in range(4):
        try:
            files[index]
            readable += 1
        except ValueError:
            pass
    assert readable == kept
    assert 360 * readable <= cache_bytes


def test_16_bits_come_back_through_the_cache_unharmed(tmp_path):
    path = save(tmp_path / "a.png", dtype=np.uint16)
    files = ImageFiles([path])
    assert not torch.equal(files[0].mul(255).round().div(255), read_image(path))
    for _ in range(2):
        assert torch.equal(files[0], read_image(path))


def test_check_lists_every_culprit_by_name(tmp_path, monkeypatch):
    paths = [
        save(tmp_path / "good.png", 16, 16),
        save(tmp_path / "flat.png", 15, 40),
        save(tmp_path / "thin.png", 40, 9),
    ]
    (tmp_path / "text.png").write_text("not a picture")
    paths += [tmp_path / "text.png", tmp_path / "gone.png"]
    with pytest.raises(ValueError, match="^Of 5 pictures 4 cannot be used") as error:
        ImageFiles(paths).check(16)
    for culprit in (
        "flat.png is 40x15 pixels, smaller than the patch of 16; lower --resolution",
        "thin.png is 9x40 pixels",
        "text.png cannot be read as a picture (unknown format); replace",
        "gone.png cannot be read (No such file",
    ):
        assert culprit in str(error.value)
    assert "good.png" not in str(error.value)
    ImageFiles(paths[:1]).check(16)
    # Pillow's guard against bombs is no OSError.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"good\.png cannot be read as a picture \(.*bomb"):
        ImageFiles(paths[:1]).check(16)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_check_finds_half_a_file_whose_header_is_whole(tmp_path, suffix):
    good, half = save(tmp_path / f"good.{suffix}", 64, 64), save(tmp_path / f"half.{suffix}", 64, 64, seed=1)
    data = half.read_bytes()
    half.write_bytes(data[: len(data) // 2] if suffix != "tif" else data[:-100])
    if suffix == "jpg":
        assert Image.open(half).size == (64, 64)
    with pytest.raises(ValueError, match=rf"^Of 2 pictures 1 cannot be used.*half\.{suffix} cannot be read") as error:
        ImageFiles([good, half]).check(16)
    assert "good" not in str(error.value)


def test_check_fills_the_cache(tmp_path):
    path = save(tmp_path / "a.png")
    files, expected = ImageFiles([path]), read_image(path)
    files.check(10)
    path.unlink()
    assert torch.equal(files[0], expected)


@pytest.mark.parametrize(("count", "shown"), [(100, False), (101, True)])
def test_check_shows_a_bar_when_it_takes_long(tmp_path, capsys, count, shown):
    ImageFiles([save(tmp_path / "a.png")] * count).check(10)
    assert ("checking pictures" in capsys.readouterr().err) == shown


def test_long_lists_of_culprits_are_cut_and_counted(tmp_path):
    paths = [tmp_path / f"{index:02}.png" for index in range(30)]
    with pytest.raises(ValueError, match=r"^Of 30 pictures 30 .*19\.png cannot be read.*\. There are 10 more\.$"):
        ImageFiles(paths).check(1)
