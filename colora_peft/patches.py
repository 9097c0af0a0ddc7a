"""Training samples as a pure function of (seed, epoch, index).

A run asks for *sample numbers* 0, 1, 2, ...: number n is the picture at position n % len of a permutation drawn for
epoch n // len, cropped, flipped and degraded by a generator seeded with (seed, epoch, index). So the position of a run
is one integer, and neither workers nor processes nor a restart change what any sample looks like.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from .pairs import Pair, PairSource, PictureSource
from .prod import RandomOrderDegradation


def sample_generator(*key: int) -> torch.Generator:
    """A generator that depends on all numbers of the key, e.g. (seed, epoch, index), and on nothing else.

    Keys that differ only by zeros at their end share a generator.
    """
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


class PatchDataset(Dataset):
    """Patches by sample number; see the module's docstring. Subclasses say what one sample is.

    Args:
        length: How many pictures an epoch has.
        resolution: Side of the square patch in pixels.
        seed: Seed of the whole run.
    """

    def __init__(self, length: int, resolution: int, seed: int) -> None:
        if resolution < 1:
            raise ValueError(f"The resolution must be at least 1 pixel, got {resolution}.")
        if length < 1:
            raise ValueError("There are no pictures to take patches from; pass at least one.")
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

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        epoch, position = divmod(number, self.length)
        index = self._order_of(epoch)[position]
        degraded, target = self.sample(index, sample_generator(self.seed, epoch, index))
        return {"pixel_values": degraded, "labels": target}

    def sample(self, index: int, generator: torch.Generator) -> Pair:
        raise NotImplementedError


class DegradedPatches(PatchDataset):
    """Clean pictures, cropped and degraded on the fly: the training data of PROD."""

    def __init__(
        self, pictures: PictureSource, degradation: RandomOrderDegradation, resolution: int, seed: int
    ) -> None:
        super().__init__(len(pictures), resolution, seed)
        self.pictures = pictures
        self.degradation = degradation

    def sample(self, index: int, generator: torch.Generator) -> Pair:
        (clean,) = random_patch((self.pictures[index],), self.resolution, generator, f"picture {index}")
        return self.degradation.apply(clean, self.degradation.draw(generator)), clean


class DegradedPictures:
    """Pairs to evaluate on, of clean pictures: the patch and the degradation of picture i depend on i alone, so that
    the figures of runs with other seeds compare.

    Args:
        pictures: The clean pictures.
        degradation: Draws a recipe for each.
        resolution: Side of the square patch in pixels.
    """

    def __init__(self, pictures: PictureSource, degradation: RandomOrderDegradation, resolution: int) -> None:
        self.names = [f"picture {index}" for index in range(len(pictures))]
        self._patches = DegradedPatches(pictures, degradation, resolution, seed=0)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Pair:
        return self._patches.sample(index, sample_generator(index))


class PairedPatches(PatchDataset):
    """Aligned patches of real pairs."""

    def __init__(self, pairs: PairSource, resolution: int, seed: int) -> None:
        super().__init__(len(pairs), resolution, seed)
        self.pairs = pairs

    def sample(self, index: int, generator: torch.Generator) -> Pair:
        name = f"pair {self.pairs.names[index]}"
        degraded, target = random_patch(self.pairs[index], self.resolution, generator, name)
        return degraded, target


def random_patch(
    images: tuple[Tensor, ...], resolution: int, generator: torch.Generator, name: str
) -> tuple[Tensor, ...]:
    """The same random square of all images (3, H, W), flipped and turned by one of the eight symmetries.

    Raises:
        ValueError: if the pictures are smaller than the patch; it names them.
    """
    height, width = images[0].shape[-2:]
    if min(height, width) < resolution:
        raise ValueError(
            f"The {name} is {width}x{height} pixels, smaller than the patch of {resolution}; "
            "lower --resolution or remove it."
        )
    top = int(torch.randint(height - resolution + 1, (), generator=generator))
    left = int(torch.randint(width - resolution + 1, (), generator=generator))
    turns = int(torch.randint(4, (), generator=generator))
    mirrored = bool(torch.randint(2, (), generator=generator))
    patches = (image[:, top : top + resolution, left : left + resolution] for image in images)
    patches = (torch.rot90(patch, turns, (1, 2)) for patch in patches)
    return tuple((patch.flip(2) if mirrored else patch).contiguous() for patch in patches)


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
