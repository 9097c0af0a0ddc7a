"""A stream is read in an order and to samples that depend on (seed, epoch) and the number of processes alone."""

import functools
import io
import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from support.loop import Killed, assert_equal, nafnet
from support.loop import run as run_training
from torch.utils.data import DataLoader

from colora_peft.data.patches import StepSampler, collate
from colora_peft.data.streams import ImageStream, StreamPatches
from colora_peft.prod import RandomOrderDegradation


def cell(number, size=12, kind="png"):
    """An image file whose red is its number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    pixels[..., 0] = number
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return {"bytes": file.getvalue(), "path": None}


def write_shards(folder, *counts, spoil=()):
    """Parquet files with so many images each, numbered through; those in `spoil` end in the middle."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, count in enumerate(counts):
        cells = [cell(number + row) for row in range(count)]
        for row in range(count):
            if number + row in spoil:
                cells[row]["bytes"] = cells[row]["bytes"][:60]
        number += count
        features = datasets.Features({"image": datasets.Image()})
        rows = datasets.Dataset.from_dict({"image": cells}, features=features)
        rows.to_parquet(folder / f"train-{shard:02}.parquet")
    return folder


@pytest.fixture(scope="module", autouse=True)
def quiet():
    datasets.disable_progress_bars()


@functools.cache
def load(folder):
    return datasets.load_dataset("parquet", data_files=str(folder / "*.parquet"), split="train", streaming=True)


def open_stream(folder, seed=1, block_size=4):
    return ImageStream(load(folder), "image", seed, block_size)


def patches(folder, max_skipped_share=0.0, **settings):
    return StreamPatches(open_stream(folder, **settings), RandomOrderDegradation(), 8, max_skipped_share)


def batches(dataset, first, last, size=3, rank=0, world_size=1, workers=0, position=None):
    steps = StepSampler(first, last, size, rank, world_size)
    sampler = dataset.sampler(steps, position)
    return list(DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=collate))


def drawn(folder, count, rank=0, world_size=1, **settings):
    """(epoch, shard, row) of the first images of a process."""
    images = open_stream(folder, **settings).drawn([0, 0, 0, 0], rank, world_size)
    found = [next(images) for _ in range(count)]
    return [(each.epoch, each.cell.shard, each.cell.row) for each in found]


def assert_same(one, other):
    assert len(one) == len(other)
    for first, second in zip(one, other, strict=True):
        assert torch.equal(first["pixel_values"], second["pixel_values"])
        assert torch.equal(first["labels"], second["labels"])
        assert first["skipped"] == second["skipped"] and first["position"] == second["position"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """21 images in five shards of unequal size, one of them empty."""
    return write_shards(tmp_path_factory.mktemp("stream"), 7, 5, 0, 6, 3)


ALL = {(shard, row) for shard, count in enumerate((7, 5, 0, 6, 3)) for row in range(count)}


@pytest.mark.parametrize("block_size", [1, 4, 100])
def test_an_epoch_visits_every_image_once_in_an_order_of_its_own(shards, block_size):
    visited = drawn(shards, 63, block_size=block_size)
    epochs = [[place[1:] for place in visited if place[0] == epoch] for epoch in range(3)]
    assert all(sorted(epoch) == sorted(ALL) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert visited == drawn(shards, 63, block_size=block_size)
    assert visited != drawn(shards, 63, block_size=block_size, seed=2)


def test_a_block_mixes_images_of_several_shards(shards):
    whole = [place[1:] for place in drawn(shards, 21, block_size=100)]
    assert len({shard for shard, _ in whole[:8]}) > 2
    in_order = [place[1:] for place in drawn(shards, 21, block_size=1)]
    assert [row for shard, row in in_order if shard == 0] == list(range(7))


@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
def test_processes_share_an_epoch_out_without_remainder(shards, world_size):
    """With fewer processes than shards by shards, with more by rows; where one's share ends it begins again."""
    count = 30 if world_size < 8 else 6
    shares = [drawn(shards, count, rank, world_size) for rank in range(world_size)]
    first_epochs = [[place[1:] for place in share if place[0] == 0] for share in shares]
    assert sorted(sum(first_epochs, [])) == sorted(ALL)
    assert all(len(share) == count for share in shares)
    if world_size <= 5:
        for one in range(world_size):
            for other in range(one):
                assert not {shard for shard, _ in first_epochs[one]} & {shard for shard, _ in first_epochs[other]}


@pytest.mark.parametrize("stop", [1, 2, 6])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2), (6, 8)])
def test_a_resumed_stream_goes_on_exactly(shards, stop, rank, world_size):
    process = {"rank": rank, "world_size": world_size, "size": 3 if world_size < 8 else 1}
    whole = batches(patches(shards), 0, 10, **process)
    begun = batches(patches(shards), 0, stop, **process)
    assert_same(begun, whole[:stop])
    position = json.loads(json.dumps(begun[-1]["position"]))
    assert_same(batches(patches(shards), stop, 10, position=position, **process), whole[stop:])


def test_workers_change_nothing(shards):
    alone = batches(patches(shards), 0, 8)
    for workers in (1, 3):
        assert_same(batches(patches(shards), 0, 8, workers=workers), alone)


def test_a_sample_depends_on_its_image_and_epoch_alone(shards):
    """Whichever process draws it, in whatever blocks."""

    def first_epoch(rank, world_size, block_size):
        dataset, stream = patches(shards, block_size=block_size), open_stream(shards, block_size=block_size)
        images = stream.drawn([0, 0, 0, 0], rank, world_size)
        mine = [each for each in (next(images) for _ in range(21)) if each.epoch == 0]
        return {(each.cell.shard, each.cell.row): dataset[each]["pixel_values"] for each in mine}

    alone = first_epoch(0, 1, 4)
    shared = {**first_epoch(0, 2, 7), **first_epoch(1, 2, 7)}
    assert shared.keys() == alone.keys() == ALL
    assert all(torch.equal(tensor, shared[place]) for place, tensor in alone.items())


def test_bad_images_are_replaced_by_others_of_the_block_and_named(tmp_path):
    folder = write_shards(tmp_path, 6, 6, spoil=[2, 9])
    alone = batches(patches(folder), 0, 8)
    reasons = [reason for batch in alone for reason in batch["skipped"]]
    assert len(reasons) >= 4 and {reason.partition(" cannot")[0] for reason in reasons} == {
        "The image of row 2 of shard 0",
        "The image of row 3 of shard 1",
    }
    assert_same(batches(patches(folder), 0, 8, workers=2), alone)
    position = alone[2]["position"]
    assert_same(batches(patches(folder), 3, 8, position=position), alone[3:])
    good = {(place[0], *place[1:]) for place in drawn(folder, 24)}
    assert len(good) == 24
    numbers = {round(float(label[0].mean()) * 255, 3) for batch in alone for label in batch["labels"]}
    assert 2 not in numbers and 9 not in numbers and len(numbers) == 10


def test_a_stream_without_an_image_for_a_process_is_refused(tmp_path):
    folder = write_shards(tmp_path / "one", 1)
    open_stream(folder).check(8, 0, 2)
    with pytest.raises(ValueError, match="no image for process 1 of 2.*fewer processes"):
        open_stream(folder).check(8, 1, 2)
    bad = write_shards(tmp_path / "bad", 2, spoil=[0, 1])
    with pytest.raises(ValueError, match=r"None of 2 images.*row 0 of shard 0 cannot be read"):
        open_stream(bad).check(8, 0, 1)
    with pytest.raises(ValueError, match="smaller than the patch of 13"):
        open_stream(folder).check(13, 0, 1)


def test_a_column_that_is_none_of_images_is_named(tmp_path):
    split = datasets.Dataset.from_dict({"text": ["a"]}).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"\['text'\], none is called image.*--image_column"):
        ImageStream(split, "image", 0, 4)
    with pytest.raises(ValueError, match="`text` holds Value.*not images"):
        ImageStream(split, "text", 0, 4)


# Training on it


class DiesAfter(StreamPatches):
    """Raises when so many samples were made."""

    def __init__(self, patches, samples):
        super().__init__(patches._stream, patches.degradation, patches.resolution, patches.max_skipped_share)
        self.left = samples

    def __getitem__(self, drawn):
        self.left -= 1
        if self.left < 0:
            raise Killed
        return super().__getitem__(drawn)


@pytest.mark.parametrize("killed_in_step", [2, 5])
def test_a_killed_run_on_a_stream_ends_with_the_same_weights(tmp_path, shards, killed_in_step):
    flags = {"gradient_accumulation_steps": 2, "max_train_steps": 6}
    expected = run_training(tmp_path / "whole", nafnet(), patches(shards), **flags)
    with pytest.raises(Killed):
        dying = DiesAfter(patches(shards), 4 * killed_in_step + 1)
        run_training(tmp_path / "parts", nafnet(), dying, checkpointing_steps=2, **flags)
    torch.manual_seed(5)
    resumed = run_training(
        tmp_path / "parts", nafnet(), patches(shards), resume_from_checkpoint="latest", dataloader_num_workers=2,
        checkpointing_steps=2, **flags,
    )  # fmt: skip
    assert_equal(resumed, expected)


def test_another_number_of_processes_is_refused(tmp_path, shards):
    run_training(tmp_path, nafnet(), patches(shards), max_train_steps=2)
    state = tmp_path / "checkpoint-2" / "trainer_state.json"
    saved = json.loads(state.read_text())
    assert len(saved["positions"]) == 1
    state.write_text(json.dumps({**saved, "positions": saved["positions"] * 2}))
    with pytest.raises(ValueError, match="on a stream by 2 processes.*this run has 1; launch as many"):
        flags = {"resume_from_checkpoint": "latest", "max_train_steps": 2}
        run_training(tmp_path, nafnet(), patches(shards), **flags)
