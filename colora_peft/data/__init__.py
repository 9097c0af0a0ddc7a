"""Data for training and evaluation: clean images, pairs of images, and patches of both.

Sources are folders and Hugging Face datasets, streams included. A training sample is a pure function of (seed, epoch,
index): neither workers nor processes nor a resume change it.
"""

from .hub_columns import HubImages
from .pairs import (
    Pair,
    PairedHubDataset,
    PairedImageFolder,
    PairSource,
    PairSubset,
    check_pairs,
    count_in_words,
    draw_pairs,
    hold_out_pairs,
)
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
from .profiles import note_on_profiles
from .sources import ImageFiles, ImageSource, check_images
from .streams import ImageStream, StreamPatches

__all__ = [
    "Batch",
    "DegradedImages",
    "DegradedPatches",
    "HubImages",
    "ImageFiles",
    "ImageSource",
    "ImageStream",
    "Pair",
    "PairSource",
    "PairSubset",
    "PairedHubDataset",
    "PairedImageFolder",
    "PairedPatches",
    "Position",
    "StepSampler",
    "StreamPatches",
    "check_images",
    "check_pairs",
    "collate",
    "count_in_words",
    "draw_pairs",
    "hold_out_pairs",
    "note_on_profiles",
    "random_patch",
    "sample_generator",
]
