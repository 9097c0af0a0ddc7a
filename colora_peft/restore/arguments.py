"""The settings of a restoration, as `colora-restore` and examples/restore.py take them on their command lines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from colora_peft.images import DEFAULT_MAX_PIXELS
from colora_peft.inference import Pooling
from colora_peft.utils import check_at_least, flag


@dataclass
class RestoreArguments:
    """Flags of the restoration."""

    input: list[str] = flag(
        help="Image files, folders (with all below them) and patterns such as 'photos/**/*.png'. Words before the "
        "first flag count, too.",
        factory=list,
    )
    model_name_or_path: str | None = flag(
        None,
        "The network: a folder, an id on the Hub, or module:function that returns it. Default: the "
        "base that the (first) adapter names; without adapter, examples/restore.py has a network of its own.",
    )
    adapter: list[str] | None = flag(
        None,
        "Adapters, folders or ids on the Hub; 'none' is the network without one. With several, each "
        "has a folder below --output_dir. Default: none.",
    )
    output_dir: str = flag("outputs/restored", "Path to the folder for the results.")
    targets: str | None = flag(
        None,
        "Path to a folder of clean images of the same names (any suffix): PSNR and SSIM, in RGB after "
        "rounding to 8 bits, of the files as they are written, so with JPEG's losses. Borders are extended "
        "and tiles laid as restore_image does, so that on images larger than --tile, or that the network must pad, "
        "the figures differ from those of finetune.py.",
    )
    input_pattern: str = flag(
        "{}",
        "Names of the inputs without suffix, such as '{}_noisy', where those of --targets differ; see finetune.py.",
    )
    target_pattern: str = flag("{}", "Names of the targets, such as '{}_clean'.")
    compare: bool = flag(
        False, "Also write input | restored (| target) side by side, in comparisons/ below --output_dir."
    )
    overwrite: bool = flag(False, "Make results again that are there already. Default: keep them.")
    tile: int = flag(512, "Side in pixels of the tiles that bound the memory. 0: the whole image at once.")
    overlap: int = flag(64, "Smallest number of pixels that neighbouring tiles share.")
    batch_size: int = flag(1, "Number of tiles that go through the network together.")
    pooling: Pooling = flag(
        "picture",
        "Means for layers that average over all they see, where there are several tiles: over the "
        "whole image (picture), over their tile, or (local) over windows of --pooling_window.",
    )
    pooling_window: int | None = flag(None, "Side in pixels of the windows of --pooling local.")
    statistics_passes: int = flag(
        2,
        "Number of passes over the tiles that gather the means of --pooling picture, each as long as the one that "
        "restores.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = flag(
        "float32", "Precision of the computation; half is faster on GPUs."
    )
    self_ensemble: bool = flag(False, "Mean over the eight flips and rotations: a little better, eight times slower.")
    format: Literal["same", "png", "tiff", "jpeg", "webp"] = flag(
        "same", "Kind of the result files. same: each as its input."
    )
    quality: int = flag(95, "Quality of JPEG (4:4:4) and WebP, 1 to 100. A lossless WebP stays lossless.")
    grey_as_rgb: bool = flag(False, "Write grey images in colour, for networks that colour them.")
    max_pixels: int = flag(
        DEFAULT_MAX_PIXELS, "Number of pixels above which images are refused: a guard against decompression bombs."
    )
    device: str | None = flag(
        None, "Name of the device, such as cpu, cuda, cuda:1 or mps. Default: the accelerator if there is one."
    )

    def __post_init__(self) -> None:
        check_at_least(self, "tile", 0)
        check_at_least(self, "overlap", 0)
        for name in ("max_pixels", "batch_size", "statistics_passes"):
            check_at_least(self, name, 1)
        if (self.pooling == "local") != (self.pooling_window is not None):
            raise ValueError("--pooling local and --pooling_window go together: give both or neither.")
        if self.pooling_window is not None:
            check_at_least(self, "pooling_window", 1)
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality must be between 1 and 100, got {self.quality}.")

    def settings(self) -> dict[str, object]:
        """The settings that decide the pixels of a result, besides the input and the weights."""
        names = ("tile", "overlap", "batch_size", "pooling", "pooling_window", "statistics_passes", "dtype")
        names += ("self_ensemble", "quality", "grey_as_rgb")
        return {name: getattr(self, name) for name in names}
