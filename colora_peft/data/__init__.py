"""Training and evaluation data: clean images, pairs of images, and patches of both.

A training sample is a pure function of (seed, epoch, index), so that neither workers nor processes nor a resume change
it. Sources are folders and Hugging Face datasets, streams included.
"""

from .pairs import Pair, PairedHubDataset, PairedImageFolder, PairSource, PairSubset, check_pairs, draw_pairs
from .patches import (
    Batch,
    DegradedPatches,
    DegradedPictures,
    PairedPatches,
    Position,
    StepSampler,
    collate,
    random_patch,
    sample_generator,
)
from .sources import HubPictures, ImageFiles, PictureSource, check_pictures
from .streams import PictureStream, StreamPatches

__all__ = [
    "Batch",
    "DegradedPatches",
    "DegradedPictures",
    "HubPictures",
    "ImageFiles",
    "Pair",
    "PairSource",
    "PairSubset",
    "PairedHubDataset",
    "PairedImageFolder",
    "PairedPatches",
    "PictureSource",
    "PictureStream",
    "Position",
    "StepSampler",
    "StreamPatches",
    "check_pairs",
    "check_pictures",
    "collate",
    "draw_pairs",
    "random_patch",
    "sample_generator",
]
