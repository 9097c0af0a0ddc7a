"""Training and evaluation data: clean images, pairs of images, and patches of both.

A training sample is a pure function of (seed, epoch, index), so that neither workers nor processes nor a resume change
it. Sources are folders and Hugging Face datasets, streams included.
"""

from .pairs import Pair, PairedHubDataset, PairedImageFolder, PairSource, PairSubset, check_pairs, draw_pairs
from .patches import (
    Batch,
    DegradedImages,
    DegradedPatches,
    PairedPatches,
    Position,
    StepSampler,
    collate,
    random_patch,
    sample_generator,
)
from .sources import HubImages, ImageFiles, ImageSource, check_images
from .streams import ImageStream, StreamPatches

__all__ = [
    "Batch",
    "DegradedPatches",
    "DegradedImages",
    "HubImages",
    "ImageFiles",
    "Pair",
    "PairSource",
    "PairSubset",
    "PairedHubDataset",
    "PairedImageFolder",
    "PairedPatches",
    "ImageSource",
    "ImageStream",
    "Position",
    "StepSampler",
    "StreamPatches",
    "check_pairs",
    "check_images",
    "collate",
    "draw_pairs",
    "random_patch",
    "sample_generator",
]
