"""Clean images come back unharmed from folders and datasets, and every culprit is listed or replaced."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from support.pairs import dataset_of, kinds, save
from torch.utils.data import DataLoader

from colora_peft.data.hub_columns import HubImages
from colora_peft.data.patches import DegradedPatches, StepSampler, collate, random_patch, sample_generator
from colora_peft.data.sources import ImageFiles, check_images, first_usable
from colora_peft.images import as_float, list_images, read_image
from colora_peft.prod import RandomOrderDegradation


def test_the_cache_returns_what_the_file_holds(tmp_path):
    paths = [save(tmp_path / f"{index}.png", seed=index) for index in range(3)]
    files = ImageFiles(paths)
    assert len(files) == 3
    first = [files[index] for index in range(3)]
    for path, image in zip(paths, first, strict=True):
        assert torch.equal(as_float(image), read_image(path))
    for path in paths:
        path.unlink()
    for index in (2, 0, 1):
        assert torch.equal(files[index], first[index]) and files[index].dtype == torch.uint8


def test_what_was_made_of_a_cached_image_may_be_written_to(tmp_path):
    files = ImageFiles([save(tmp_path / "a.png")])
    expected = read_image(tmp_path / "a.png")
    for _ in range(3):
        as_float(files[0]).zero_()
    assert torch.equal(as_float(files[0]), expected)


@pytest.mark.parametrize(("cache_bytes", "kept"), [(0, 0), (359, 0), (360, 1), (1000, 2), (10_000, 4)])
def test_the_cache_never_holds_more_than_it_may(tmp_path, cache_bytes, kept):
    paths = [save(tmp_path / f"{index}.png", seed=index) for index in range(4)]  # 10 * 12 * 3 = 360 bytes each
    files = ImageFiles(paths, cache_bytes)
    expected = [read_image(path) for path in paths]
    for _ in range(2):
        for index in range(4):
            assert torch.equal(as_float(files[index]), expected[index])
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
    (tmp_path / "text.png").write_text("not an image")
    paths += [tmp_path / "text.png", tmp_path / "gone.png"]
    with pytest.raises(ValueError, match="^Of 5 images 4 cannot be used") as error:
        check_images(ImageFiles(paths), 16)
    for culprit in (
        "flat.png is 40x15 pixels, smaller than the patch of 16; lower --resolution",
        "thin.png is 9x40 pixels",
        "text.png cannot be read as an image (unknown format); replace",
        "gone.png cannot be read (No such file",
    ):
        assert culprit in str(error.value)
    assert "good.png" not in str(error.value)
    check_images(ImageFiles(paths[:1]), 16)
    monkeypatch.setattr("colora_peft.images.reading.DEFAULT_MAX_PIXELS", 100)
    with pytest.raises(ValueError, match=r"good\.png cannot be read as an image \(.*more than the limit of 100"):
        check_images(ImageFiles(paths[:1]), 16)


def test_check_finds_half_a_file_whose_header_is_whole(tmp_path):
    half = save(tmp_path / "half.jpg", 64, 64)
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    assert Image.open(half).size == (64, 64)
    with pytest.raises(ValueError, match=r"^Of 1 images 1 cannot be used.*half\.jpg cannot be read"):
        check_images(ImageFiles([half]), 16)


def test_check_fills_the_cache(tmp_path):
    path = save(tmp_path / "a.png")
    files, expected = ImageFiles([path]), read_image(path)
    check_images(files, 10)
    path.unlink()
    assert torch.equal(as_float(files[0]), expected)


@pytest.mark.parametrize(("count", "shown"), [(100, False), (101, True)])
def test_check_shows_a_bar_when_it_takes_long(tmp_path, capsys, count, shown):
    check_images(ImageFiles([save(tmp_path / "a.png")] * count), 10)
    assert ("checking images" in capsys.readouterr().err) == shown


def test_long_lists_of_culprits_are_cut_and_counted(tmp_path):
    paths = [tmp_path / f"{index:02}.png" for index in range(30)]
    with pytest.raises(ValueError, match=r"^Of 30 images 30 .*19\.png cannot be read.*\. There are 10 more\.$"):
        check_images(ImageFiles(paths), 1)


# Every kind of file


def test_files_of_every_kind_are_the_same_from_a_folder_and_a_dataset(tmp_path):
    paths = list_images(kinds(tmp_path))
    files, rows = ImageFiles(paths), HubImages(dataset_of(tmp_path), "photo")
    assert len(files) == len(rows) == 5
    for index, path in enumerate(paths):
        for image in (files[index], rows[index], files[index]):
            assert torch.equal(as_float(image), read_image(path))
            assert image.dtype == (torch.float32 if path.stem == "deep" else torch.uint8)
    check_images(rows, 16)


def test_a_patch_cropped_from_8_bits_is_bitwise_that_of_the_float_image(tmp_path):
    paths = list_images(kinds(tmp_path))
    for index, path in enumerate(paths):
        for seed in range(4):
            of_bytes, of_floats = (
                random_patch((image,), 9, sample_generator(seed), "a")[0]
                for image in (ImageFiles(paths)[index], read_image(path))
            )
            assert torch.equal(as_float(of_bytes), of_floats)


def test_folders_below_are_searched_where_asked_for(tmp_path):
    for name in ("b.png", "a/z.png", "a/deep/er/c.png", ".hidden/d.png", "a/.e.png"):
        save(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    found = [str(path.relative_to(tmp_path)) for path in list_images(tmp_path, nested=True)]
    assert found == ["a/deep/er/c.png", "a/z.png", "b.png"]
    assert [path.name for path in list_images(tmp_path)] == ["b.png"]


# What is bad


def spoilt(folder, count=8, bad=(2, 5)):
    paths = [save(folder / f"{index}.png", 16, 16, seed=index) for index in range(count)]
    for index in bad:
        paths[index].write_bytes(paths[index].read_bytes()[:80])
    return ImageFiles(paths)


def patches(images, share=0.5):
    return DegradedPatches(images, RandomOrderDegradation(), 9, seed=3, max_skipped_share=share)


def test_a_bad_image_is_replaced_by_another_and_the_others_stay_as_they_were(tmp_path):
    whole, some_bad = patches(spoilt(tmp_path / "good", bad=())), patches(spoilt(tmp_path / "bad"))
    replaced = []
    for number in range(24):
        sample, index = some_bad[number], whole.locate(number)[1]
        if index in (2, 5):
            replaced.append(sample)
            assert f"{index}.png cannot be read" in sample["skipped"][0]
        else:
            assert "skipped" not in sample
            assert torch.equal(sample["pixel_values"], whole[number]["pixel_values"])
    assert len(replaced) == 6
    again = patches(ImageFiles(some_bad.images.paths))
    for number in reversed(range(24)):
        assert torch.equal(again[number]["pixel_values"], some_bad[number]["pixel_values"])
        assert again[number].get("skipped") == some_bad[number].get("skipped")


def test_workers_replace_alike(tmp_path):
    dataset = patches(spoilt(tmp_path))
    alone, shared = (
        list(DataLoader(dataset, batch_sampler=StepSampler(0, 5, 4), num_workers=workers, collate_fn=collate))
        for workers in (0, 2)
    )
    assert sum(len(batch["skipped"]) for batch in alone) >= 4
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"]) and one["skipped"] == other["skipped"]


def test_images_too_small_are_replaced_as_well(tmp_path):
    paths = [save(tmp_path / "small.png", 8, 30), save(tmp_path / "large.png", 16, 16)]
    dataset = patches(ImageFiles(paths))
    reasons = {reason for number in range(4) for reason in dataset[number].get("skipped", ())}
    assert len(reasons) == 1 and "small.png is 30x8 pixels, smaller than the patch of 9" in reasons.pop()


def test_nothing_usable_is_an_error_that_names_what_was_tried(tmp_path):
    with pytest.raises(ValueError, match=r"None of 9 images drawn can be used\. .*\.png cannot be read"):
        patches(spoilt(tmp_path, count=3, bad=(0, 1, 2)))[0]
    with pytest.raises(ValueError, match="None of 0"):
        first_usable([], 1)


# Digests


def test_a_digest_follows_names_and_sizes_and_not_the_place(tmp_path):
    folder = kinds(tmp_path / "one")
    before = ImageFiles(list_images(folder)).digest
    assert before.startswith("5 clean pictures, ")
    shutil.copytree(folder, tmp_path / "two")
    assert ImageFiles(list_images(tmp_path / "two")).digest == before
    found = {before}
    (tmp_path / "two" / "grey.png").rename(tmp_path / "two" / "gray.png")
    found.add(ImageFiles(list_images(tmp_path / "two")).digest)
    save(tmp_path / "two" / "gray.png", 20, 20)
    found.add(ImageFiles(list_images(tmp_path / "two")).digest)
    (tmp_path / "two" / "gray.png").unlink()
    found.add(ImageFiles(list_images(tmp_path / "two")).digest)
    assert len(found) == 4
