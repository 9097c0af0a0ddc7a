"""A training sample is a pure function of (seed, epoch, index), whoever asks for it and in whatever order."""

import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from support.pairs import save
from torch.utils.data import DataLoader

from colora_peft.data.pairs import PairedImageFolder, PairSubset
from colora_peft.data.patches import (
    DegradedImages,
    DegradedPatches,
    PairedPatches,
    StepSampler,
    random_patch,
    sample_generator,
)
from colora_peft.prod import RandomOrderDegradation

OFFSET = 0.25


def sample_image(index, height=20, width=26):
    generator = torch.Generator().manual_seed(index)
    return torch.rand(3, height, width, generator=generator) / 2


class AlignedPairs:
    """Pairs whose target is the input plus a constant; each knows its own index by its red value."""

    def __init__(self, count=5, size=(20, 26)):
        self.names = [f"scene {index}" for index in range(count)]
        self.size = size

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        degraded = sample_image(index, *self.size)
        degraded[0] = index
        return degraded, degraded + OFFSET


class Images:
    def __len__(self):
        return 5

    def __getitem__(self, index):
        return sample_image(index)

    def name(self, index):
        return f"image {index}"


def paired(seed=1, **kwargs):
    return PairedPatches(AlignedPairs(**kwargs), resolution=16, seed=seed)


def degraded(seed=1):
    return DegradedPatches(Images(), RandomOrderDegradation(), resolution=16, seed=seed)


def test_images_to_evaluate_on_are_the_same_whenever_asked_for():
    pairs, again = (DegradedImages(Images(), RandomOrderDegradation(), resolution=16) for _ in range(2))
    assert len(pairs) == len(pairs.names) == 5
    first = [pairs[index] for index in range(5)]
    for index in (3, 0, 3, 4):
        assert all(torch.equal(one, other) for one, other in zip(first[index], again[index], strict=True))
    assert all(tensor.shape == (3, 16, 16) for pair in first for tensor in pair)
    assert any(not torch.equal(degraded, clean) for degraded, clean in first)


both_kinds = pytest.mark.parametrize("make", [paired, degraded])


def assert_same(sample, other):
    assert sample.keys() == other.keys() == {"pixel_values", "labels"}
    for key in sample:
        assert torch.equal(sample[key], other[key])


@both_kinds
def test_a_sample_depends_on_its_number_and_the_seed_alone(make):
    numbers = [0, 3, 4, 5, 7, 23, 1000]
    samples = {number: make()[number] for number in numbers}
    patches = make()
    for number in [*reversed(numbers), *numbers]:
        torch.manual_seed(number)
        assert_same(patches[number], samples[number])
    assert_same(pickle.loads(pickle.dumps(patches))[23], samples[23])
    other = make(seed=2)
    assert not any(torch.equal(other[number]["pixel_values"], samples[number]["pixel_values"]) for number in numbers)


@both_kinds
def test_samples_are_patches(make):
    for number in range(10):
        for image in make()[number].values():
            assert image.shape == (3, 16, 16)
            assert image.dtype == torch.float32
            assert image.is_contiguous()


@both_kinds
def test_workers_change_nothing(make):
    batches = [
        list(DataLoader(make(), batch_sampler=StepSampler(1, 5, batch_size=3), num_workers=workers))
        for workers in (0, 2)
    ]
    assert len(batches[0]) == len(batches[1]) == 4
    for alone, shared in zip(*batches, strict=True):
        assert_same(alone, shared)


def test_an_epoch_visits_every_image_once_each_time_in_another_order():
    patches = paired(count=7)
    orders = [
        tuple(int(patches[epoch * 7 + position]["pixel_values"][0, 0, 0]) for position in range(7))
        for epoch in range(6)
    ]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert len(set(orders)) > 3


def test_an_image_looks_different_in_every_epoch():
    patches = paired(count=1)
    looks = {tuple(patches[epoch]["pixel_values"].flatten().tolist()) for epoch in range(10)}
    # There are 5 * 11 places and 8 symmetries: two of ten may well be the same.
    assert len(looks) >= 8


def test_the_crops_of_a_pair_are_aligned():
    patches = paired()
    for number in range(20):
        sample = patches[number]
        assert torch.equal(sample["pixel_values"] + OFFSET, sample["labels"])


def test_the_target_of_prod_is_the_clean_patch():
    patches = degraded()
    differing = 0
    for number in range(10):
        sample = patches[number]
        windows = torch.stack([sample_image(index) for index in range(5)]).unfold(2, 16, 1).unfold(3, 16, 1)
        windows = windows.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 16, 16)
        turned = [torch.rot90(sample["labels"], turns, (1, 2)) for turns in range(4)]
        views = [*turned, *(view.flip(2) for view in turned)]
        assert sum(bool((windows == view).all((1, 2, 3)).any()) for view in views) == 1
        differing += not torch.equal(sample["pixel_values"], sample["labels"])
    assert differing > 5


def test_all_eight_symmetries_and_all_places_occur_equally_often():
    image = torch.arange(9.0).view(1, 3, 3)
    generator = sample_generator(0)
    draws = Counter(tuple(random_patch((image,), 3, generator, "a")[0].flatten().tolist()) for _ in range(800))
    assert len(draws) == 8
    assert all(abs(count - 100) < 50 for count in draws.values())  # five standard deviations of a binomial
    image = torch.arange(12.0).view(1, 3, 4)
    places = Counter(random_patch((image,), 1, generator, "a")[0].item() for _ in range(1200))
    assert len(places) == 12
    assert all(abs(count - 100) < 50 for count in places.values())


def test_a_patch_may_be_the_whole_image():
    (patch,) = random_patch((sample_image(0, 16, 16),), 16, sample_generator(0), "a")
    assert torch.equal(patch.flatten().sort().values, sample_image(0, 16, 16).flatten().sort().values)


def test_generators_depend_on_every_number_of_their_key():
    keys = [(seed, epoch, index) for seed in range(4) for epoch in range(4) for index in range(4)]
    firsts = {torch.rand((), generator=sample_generator(*key), dtype=torch.float64).item() for key in keys}
    assert len(firsts) == len(keys)


# The sampler


def test_two_processes_share_the_batches_of_one():
    alone = list(StepSampler(3, 9, batch_size=4))
    shares = [list(StepSampler(3, 9, batch_size=2, rank=rank, world_size=2)) for rank in range(2)]
    assert [first + second for first, second in zip(*shares, strict=True)] == alone
    assert all(len(share) == len(StepSampler(3, 9, 2, 1, 2)) == 6 for share in shares)


@pytest.mark.parametrize("stop", [0, 1, 7, 10])
def test_a_resumed_run_continues_the_sequence(stop):
    whole = list(StepSampler(0, 10, batch_size=3, rank=1, world_size=2))
    assert list(StepSampler(0, stop, 3, 1, 2)) + list(StepSampler(stop, 10, 3, 1, 2)) == whole
    assert whole == list(StepSampler(0, 10, 3, 1, 2))


def test_steps_consume_consecutive_numbers_from_zero():
    numbers = [number for batch in StepSampler(0, 6, batch_size=5) for number in batch]
    assert numbers == list(range(30))


# Bad input


def test_an_image_smaller_than_the_patch_is_named():
    patches = paired(count=1, size=(20, 15))
    with pytest.raises(ValueError, match=r"pair scene 0 is 15x20 pixels, smaller than the patch of 16.*--resolution"):
        patches[0]
    patches = DegradedPatches(Images(), RandomOrderDegradation(), resolution=21, seed=0)
    with pytest.raises(ValueError, match=r"image \d is 26x20 pixels, smaller than the patch of 21"):
        patches[0]


@pytest.mark.parametrize(
    ("count", "resolution", "seed", "culprit"), [(0, 16, 0, "no images"), (3, 0, 0, "got 0"), (3, 16, -1, "got -1")]
)
def test_impossible_settings_are_refused(count, resolution, seed, culprit):
    with pytest.raises(ValueError, match=culprit):
        PairedPatches(AlignedPairs(count), resolution, seed)


def roughness(image):
    """Mean difference of neighbours."""
    return (image[:, 1:] - image[:, :-1]).abs().mean()


def untouched(enlarged_share):
    degradation = RandomOrderDegradation(untouched_share=1.0)
    return DegradedPatches(Images(), degradation, 16, seed=2, enlarged_share=enlarged_share)


def test_enlarged_patches_are_soft_on_both_sides_and_as_large_as_the_others():
    for number in range(6):
        sharp, soft = untouched(0.0)[number], untouched(1.0)[number]
        assert torch.equal(soft["pixel_values"], soft["labels"])
        assert soft["labels"].shape == sharp["labels"].shape == (3, 16, 16)
        assert roughness(soft["labels"]) < roughness(sharp["labels"])
        assert 0 <= soft["labels"].min() and soft["labels"].max() <= 1


def test_a_share_of_the_patches_is_enlarged():
    enlarged = sum(roughness(untouched(0.25)[number]["labels"]) < 0.14 for number in range(400))
    assert 60 < enlarged < 120  # some are enlarged by less than the eye sees


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_patches_are_cut_before_they_become_floats(tmp_path, dtype, monkeypatch):
    for side in ("input", "target"):
        save(tmp_path / side / "a.png", 40, 50, seed=len(side), dtype=dtype)
    pairs = PairedImageFolder(tmp_path)
    patches = PairedPatches(PairSubset(pairs, [0]), 16, seed=0)
    expected = random_patch(pairs[0], 16, sample_generator(0, 0, 0), "a")
    monkeypatch.setattr(PairedImageFolder, "__getitem__", None)  # which makes floats of whole images
    sample = patches[0]
    assert torch.equal(sample["pixel_values"], expected[0]) and torch.equal(sample["labels"], expected[1])
