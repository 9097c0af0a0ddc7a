"""Training samples as a pure function of (seed, epoch, index).

A run asks for *sample numbers* 0, 1, 2, ...: number n is the image at position n % len of a permutation drawn for
epoch n // len, cropped, flipped and degraded by a generator seeded with (seed, epoch, index). So the position of a run
is one integer, and neither workers nor processes nor a restart change what any sample looks like.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from colora_peft.images import as_float
from colora_peft.prod import RandomOrderDegradation, uniform

from .pairs import Pair, PairSource, stored_pair
from .sources import Candidate, ImageSource, check_size, first_usable

# "pixel_values" and "labels", (3, S, S) in [0, 1]; "skipped", why images were, if any; of a stream "position".
Sample = dict[str, Any]
Batch = dict[str, Any]  # the same of several samples, (B, 3, S, S), always with "skipped"; "position" after the last
Position = list[int]  # where in a stream a process stands
_LARGEST_ENLARGEMENT = 2.0
_REPLACEMENTS = 8  # images tried in place of one that cannot be used


def sample_generator(*key: int) -> torch.Generator:
    """Returns a generator that depends on all numbers of the key, e.g. (seed, epoch, index), and on nothing else.

    Keys that differ only by zeros at their end share a generator.
    """
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


class PatchDataset(Dataset):
    """Patches by sample number, as the module's docstring says. Subclasses make one sample.

    Args:
        length: Number of images of an epoch.
        resolution: Side of the square patch in pixels.
        seed: Seed of the whole run.
    """

    max_skipped_share = 0.0
    digest: str | None = None  # of what the images are, where that is known

    def __init__(self, length: int, resolution: int, seed: int) -> None:
        if resolution < 1:
            raise ValueError(f"The resolution must be at least 1 pixel, got {resolution}.")
        if length < 1:
            raise ValueError("There are no images to take patches from; pass at least one.")
        if seed < 0:
            raise ValueError(f"The seed must not be negative, got {seed}.")
        self.length = length
        self.resolution = resolution
        self.seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def _order_of(self, epoch: int) -> list[int]:
        if epoch != self._epoch:
            self._order = torch.randperm(self.length, generator=sample_generator(self.seed, epoch)).tolist()
            self._epoch = epoch
        return self._order

    def locate(self, number: int) -> tuple[int, int]:
        """Returns the epoch and the image of a sample number."""
        epoch, position = divmod(number, self.length)
        return epoch, self._order_of(epoch)[position]

    def __getitem__(self, number: int) -> Sample:
        epoch, index = self.locate(number)
        degraded, target = self.sample(index, sample_generator(self.seed, epoch, index))
        return {"pixel_values": degraded, "labels": target}

    def sample(self, index: int, generator: torch.Generator) -> Pair:
        """Returns input and target of a sample."""
        raise NotImplementedError

    def sampler(self, steps: StepSampler, position: Position | None) -> Sampler:
        """Returns the samples to ask for in these steps: their numbers. A stream goes on at its `position`."""
        return steps


class DegradedPatches(PatchDataset):
    """Clean images, cropped and degraded on the fly: the training data of PROD.

    An image that cannot be read or is smaller than the patch is replaced by another one, drawn by the generator of
    the sample. So samples remain a pure function of (seed, epoch, index) while the files do not change.

    Args:
        images: The clean images.
        degradation: Draws a recipe for each.
        resolution: Side of the square patch in pixels.
        seed: Seed of the whole run.
        max_skipped_share: Share of the samples that may be replaced before training stops.
        enlarged_share: Share of the patches that are enlarged after they were degraded, see `degraded_sample`.
    """

    def __init__(
        self,
        images: ImageSource,
        degradation: RandomOrderDegradation,
        resolution: int,
        seed: int,
        max_skipped_share: float = 0.0,
        enlarged_share: float = 0.0,
    ) -> None:
        super().__init__(len(images), resolution, seed)
        self.images = images
        self.degradation = degradation
        self.max_skipped_share = max_skipped_share
        self.enlarged_share = enlarged_share

    @property
    def digest(self) -> str | None:
        return getattr(self.images, "digest", None)

    def __getitem__(self, number: int) -> Sample:
        epoch, index = self.locate(number)
        generator = sample_generator(self.seed, epoch, index)
        candidates = self._candidates(index, generator)
        return degraded_sample(candidates, self.degradation, self.resolution, generator, self.enlarged_share)

    def _candidates(self, index: int, generator: torch.Generator) -> Iterator[Candidate]:
        for _ in range(1 + _REPLACEMENTS):
            yield self.images.name(index), partial(self.images.__getitem__, index)
            index = int(torch.randint(self.length, (), generator=generator))


def degraded_sample(
    candidates: Iterable[Candidate],
    degradation: RandomOrderDegradation,
    resolution: int,
    generator: torch.Generator,
    enlarged_share: float = 0.0,
) -> Sample:
    """Returns a patch of the first usable candidate, degraded, and under `skipped` why others were not, if any.

    A share of the patches is cut smaller, degraded and then enlarged with its target, up to twice. It is soft and its
    noise is coarse, as in photos of cameras at their full resolution. A network that knows sharp photos alone takes
    these for blurred.

    Raises:
        ValueError: None can be used; the reasons are given.
    """
    image, name, skipped = first_usable(candidates, resolution)
    side = _side_before_enlarging(resolution, enlarged_share, generator)
    clean = as_float(random_patch((image,), side, generator, name)[0])
    degraded = degradation.apply(clean, degradation.draw(generator))
    sample: Sample = {"pixel_values": _enlarge(degraded, resolution), "labels": _enlarge(clean, resolution)}
    return {**sample, "skipped": skipped} if skipped else sample


def _side_before_enlarging(resolution: int, enlarged_share: float, generator: torch.Generator) -> int:
    if not enlarged_share or uniform((0.0, 1.0), generator) >= enlarged_share:
        return resolution
    return max(1, round(resolution / uniform((1.0, _LARGEST_ENLARGEMENT), generator)))


def _enlarge(image: Tensor, side: int) -> Tensor:
    """Returns the square image (3, S, S) with `side` pixels on each side."""
    if image.shape[-1] == side:
        return image
    return F.interpolate(image[None], (side, side), mode="bicubic")[0].clamp(0, 1)


class DegradedImages:
    """Pairs to evaluate on, made of clean images. Patch and degradation of an image depend on its index alone, so that
    the figures of runs with other seeds compare.

    Args:
        images: The clean images.
        degradation: Draws a recipe for each.
        resolution: Side of the square patch in pixels.
    """

    def __init__(self, images: ImageSource, degradation: RandomOrderDegradation, resolution: int) -> None:
        self.names = [f"image {index}" for index in range(len(images))]
        self._images = images
        self._degradation = degradation
        self._resolution = resolution

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Pair:
        candidates = [(self.names[index], partial(self._images.__getitem__, index))]
        sample = degraded_sample(candidates, self._degradation, self._resolution, sample_generator(index))
        return sample["pixel_values"], sample["labels"]


class PairedPatches(PatchDataset):
    """Aligned patches of real pairs."""

    def __init__(self, pairs: PairSource, resolution: int, seed: int) -> None:
        super().__init__(len(pairs), resolution, seed)
        self.pairs = pairs

    @property
    def digest(self) -> str | None:
        return getattr(self.pairs, "digest", None)

    def sample(self, index: int, generator: torch.Generator) -> Pair:
        name = f"The pair {self.pairs.names[index]}"
        # Cut first, then made floats: large photos would take four times the memory.
        degraded, target = random_patch(stored_pair(self.pairs, index), self.resolution, generator, name)
        return as_float(degraded), as_float(target)


def random_patch(
    images: tuple[Tensor, ...], resolution: int, generator: torch.Generator, name: str
) -> tuple[Tensor, ...]:
    """Returns the same random square of all images (3, H, W), flipped and turned by one of the eight symmetries.

    Raises:
        ValueError: The images are smaller than the patch.
    """
    check_size(images[0], resolution, name)
    height, width = images[0].shape[-2:]
    top = int(torch.randint(height - resolution + 1, (), generator=generator))
    left = int(torch.randint(width - resolution + 1, (), generator=generator))
    turns = int(torch.randint(4, (), generator=generator))
    mirrored = bool(torch.randint(2, (), generator=generator))
    patches = (image[:, top : top + resolution, left : left + resolution] for image in images)
    patches = (torch.rot90(patch, turns, (1, 2)) for patch in patches)
    return tuple((patch.flip(2) if mirrored else patch).contiguous() for patch in patches)


def collate(samples: list[Sample]) -> Batch:
    """Stacks samples to a batch."""
    batch: Batch = {key: torch.stack([sample[key] for sample in samples]) for key in ("pixel_values", "labels")}
    batch["skipped"] = [reason for sample in samples for reason in sample.get("skipped", ())]
    batch["position"] = samples[-1].get("position")
    return batch


class StepSampler(Sampler[list[int]]):
    """Batches of sample numbers for the steps [first_step, last_step) of one process.

    A step consumes `world_size * batch_size` consecutive numbers, of which process `rank` takes its share, so the
    global batch is the same however it is split.
    """

    def __init__(self, first_step: int, last_step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.steps = range(first_step, last_step)
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            start = (step * self.world_size + self.rank) * self.batch_size
            yield list(range(start, start + self.batch_size))
