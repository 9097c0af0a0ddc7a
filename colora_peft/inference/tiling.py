"""Images of any size, restored tile by tile in a memory that the tile bounds and not the image."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from colora_peft.utils import alone_with, reflected_indices

from .global_pooling import ImageStatistics, Rectangle
from .local_pooling import local_pooling_of_this_thread, pools_locally
from .network import evaluation_mode, reconstruct, tile_multiple
from .self_ensemble import EIGHT, Transform
from .tile_grid import TileAxis, check_tile, lay_tiles

Pooling = Literal["picture", "tile", "local"]


class NotFinite(ValueError):
    """The network returned NaN or infinite values."""


@torch.no_grad()
def restore_image(
    model: nn.Module,
    image: Tensor,
    *,
    tile: int | None = 512,
    overlap: int = 64,
    batch_size: int = 1,
    dtype: torch.dtype | None = None,
    self_ensemble: bool = False,
    pooling: Pooling = "picture",
    pooling_window: int | None = None,
    statistics_passes: int = 2,
    size_multiple: int | None = None,
    progress: bool = False,
) -> Tensor:
    """Restores one image (3, H, W) in [0, 1]; returns float32 of the same shape in [0, 1] on the image's device.

    Overlapping tiles are blended by smooth weights that sum to one. At its lower and right border the image is
    extended by reflection, up to a multiple of what the network halves. The image and the result may lie on the CPU
    while the network is on a GPU; besides them, memory holds no more than `batch_size` tiles need. The network is in
    evaluation mode meanwhile and as before afterwards. Of several threads with one network each waits for its turn.

    `tile=None, size_multiple=1` gives what `colora_peft.evaluation.evaluate` measures, except for large images: the
    whole image as it is.

    Args:
        model: Any network that `colora_peft.inference.reconstruct` takes, bare or with adapters.
        image: The degraded image.
        tile: Side of the square tiles in pixels, rounded down to the size multiple; None restores the image at once.
        overlap: Least number of pixels that neighbouring tiles share.
        batch_size: Number of tiles that go through the network together. With pooling="picture" it changes the result
            a little, because the tiles of a batch know each other's means.
        dtype: Half precision (torch.bfloat16, torch.float16) by autocast; None keeps the network's own precision.
        self_ensemble: Average over the eight flips and rotations of each tile (EDSR: Lim et al., CVPRW 2017, arXiv
            1707.02921, section 3.4). Takes eight times as long.
        pooling: What layers that average over all they see are given. "picture": the mean over the whole image,
            gathered by `statistics_passes`; "tile": the mean over their tile; "local": means over windows of
            `pooling_window` (see `local_pooling`). All three concern `nn.AdaptiveAvgPool2d(1)`, "picture" also modules
            that say so, such as Restormer's attention (see `colora_peft.inference.global_pooling`).
        pooling_window: Side of the windows in pixels.
        statistics_passes: Number of passes that gather means before the pass that restores. Each takes as long as
            restoring, and more come closer to the untiled image. There are none for a single tile, or where no layer
            averages.
        size_multiple: What tiles begin and end at multiples of; None takes `tile_multiple` of the network.
        progress: Show a bar.

    Raises:
        ValueError: `image` is not a float image (3, H, W) in [0, 1], is empty or holds NaN; a setting is impossible;
            or the network changes the shape, or returns NaN or infinite values.
        RuntimeError: No pooling layer of a compiled network that has some can be watched.
        TypeError: `image` is no tensor, such as a NumPy array; or the network returns no images.
    """
    _check_image(image)
    _check_choice(model, pooling, pooling_window, statistics_passes, batch_size)
    multiple = tile_multiple(model) if size_multiple is None else size_multiple
    if multiple < 1:
        raise ValueError(f"The size_multiple must be at least 1, got {multiple}.")
    if tile is not None:
        check_tile(tile, overlap, multiple)
    rows, columns = (lay_tiles(size, tile, overlap, multiple) for size in image.shape[1:])
    run = _Run(model, image, rows, columns, batch_size, dtype)
    transforms = EIGHT if self_ensemble else EIGHT[:1]
    averaged = pooling == "picture" and run.tiles > 1 and ImageStatistics(model).needed
    passes = statistics_passes if averaged else 0
    restored = torch.zeros_like(image, dtype=torch.float32, memory_format=torch.contiguous_format)
    total = len(transforms) * (passes + 1) * run.tiles
    with ExitStack() as stack:
        stack.enter_context(alone_with(model))
        stack.enter_context(evaluation_mode(model))
        if pooling == "local":
            stack.enter_context(local_pooling_of_this_thread(model, pooling_window))
        bar = stack.enter_context(tqdm(total=total, desc="restoring", unit="tile", leave=False, disable=not progress))
        for transform in transforms:
            with _statistics(run, transform, passes, bar) as statistics:
                for places, tiles in run.restored_tiles(transform, statistics, gather=False):
                    for place, pixels in zip(places, tiles, strict=True):
                        _blend(restored, pixels.mul_(1 / len(transforms)), place)
                    bar.update(len(places))
    return restored.clamp_(0, 1)


def _check_image(image: Tensor) -> None:
    if not isinstance(image, Tensor):
        raise TypeError(_not_a_tensor(image))
    if image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise ValueError(f"The image must be (3, H, W) and not empty, got shape {tuple(image.shape)}.")
    if not image.is_floating_point():
        raise ValueError(f"The image is {image.dtype}: pass floats in [0, 1] (divide 8-bit images by 255).")
    low, high = (value.item() for value in image.aminmax())  # NaN if there is any
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"The image has values from {low:g} to {high:g}; it must lie in [0, 1] without NaN: clamp it, or divide "
            "8-bit images by 255."
        )


def _not_a_tensor(image: Any) -> str:
    shape, dtype = getattr(image, "shape", None), getattr(image, "dtype", None)
    if shape is None or dtype is None:
        return (
            f"The image is of type {type(image).__name__}: pass a float tensor (3, H, W) in [0, 1], such as "
            "colora_peft.images.read_image(path) returns."
        )
    is_channels_first = len(shape) == 3 and shape[0] == 3 != shape[2]
    colours = "image[..., :3]" if len(shape) == 3 and shape[2] == 4 and not is_channels_first else "image"
    order = ".expand(3, -1, -1)" if len(shape) == 2 else "" if is_channels_first else ".permute(2, 0, 1)"
    scale = {"uint8": " / 255", "uint16": ".float() / 65535"}.get(str(dtype), ".float()")
    return (
        f"The image is an array of shape {tuple(shape)} and dtype {dtype}: pass a float tensor (3, H, W) in [0, 1], "
        f"here torch.from_numpy({colours}){order}{scale}. Of an array of OpenCV, which is BGR, take "
        "image[..., ::-1].copy() first."
    )


def _check_choice(
    model: nn.Module, pooling: Pooling, pooling_window: int | None, statistics_passes: int, batch_size: int
) -> None:
    if pooling not in get_args(Pooling):
        raise ValueError(f"The pooling is {pooling!r}; take one of {', '.join(get_args(Pooling))}.")
    if (pooling == "local") != (pooling_window is not None):
        raise ValueError('The settings pooling="local" and pooling_window go together: give both or neither.')
    if pooling == "picture" and pools_locally(model):
        raise ValueError(
            f'{type(model).__name__} pools locally: pass pooling="tile" inside `local_pooling`, or leave it first.'
        )
    if batch_size < 1 or statistics_passes < 1:
        raise ValueError(
            f"The settings batch_size and statistics_passes must be at least 1, got {batch_size} and "
            f'{statistics_passes}; for no passes take pooling="tile".'
        )


@dataclass(frozen=True)
class _Place:
    """One tile: its position in the image, its weights, and the part that it alone answers for."""

    top: int
    left: int
    row_weights: Tensor
    column_weights: Tensor
    core: Rectangle


@dataclass(frozen=True)
class _Run:
    """A network, an image, and the tiles in which the image goes through the network."""

    model: nn.Module
    image: Tensor
    rows: TileAxis
    columns: TileAxis
    batch_size: int
    dtype: torch.dtype | None

    @property
    def tiles(self) -> int:
        return len(self.rows.starts) * len(self.columns.starts)

    def restored_tiles(
        self, transform: Transform, statistics: ImageStatistics | None, gather: bool
    ) -> Iterator[tuple[list[_Place], Tensor]]:
        """Yields batches of tiles: their places, and what the network made of them, (B, 3, h, w) float32."""
        parameter = next((each for each in self.model.parameters() if each.is_floating_point()), self.image)
        grid = itertools.product(range(len(self.rows.starts)), range(len(self.columns.starts)))
        places = itertools.starmap(self._place, sorted(grid, key=_scattered) if gather else grid)
        while batch := list(itertools.islice(places, self.batch_size)):
            tiles = torch.stack([self._cut(place) for place in batch]).to(parameter.device, parameter.dtype)
            tiles = transform.apply(tiles)
            if statistics is not None:
                shape = tuple(tiles.shape[-2:])
                cores = [transform.apply_to_rectangle(place.core, shape) for place in batch]
                statistics.begin_batch(shape, cores if gather else None)
            with torch.autocast(parameter.device.type, self.dtype, enabled=self.dtype not in (None, torch.float32)):
                tiles = reconstruct(self.model, tiles)
            tiles = transform.undo(tiles.float())
            if not torch.isfinite(tiles).all():
                raise NotFinite(
                    f"{type(self.model).__name__} returned NaN or infinite values: its weights are broken, or "
                    "too large for half precision (try dtype=torch.bfloat16 or None)."
                )
            yield batch, tiles

    def _place(self, row: int, column: int) -> _Place:
        rows, columns = self.rows, self.columns
        core = (rows.cores[row], columns.cores[column])
        return _Place(rows.starts[row], columns.starts[column], rows.weights[row], columns.weights[column], core)

    def _cut(self, place: _Place) -> Tensor:
        """Returns the tile (3, h, w), reflected where it reaches beyond the image."""
        rows = reflected_indices(place.top, place.top + self.rows.length, self.rows.size)
        columns = reflected_indices(place.left, place.left + self.columns.length, self.columns.size)
        return self.image[:, rows.to(self.image.device)[:, None], columns.to(self.image.device)]


@contextmanager
def _statistics(run: _Run, transform: Transform, passes: int, bar: tqdm) -> Iterator[ImageStatistics | None]:
    """Context in which pooling layers use the means over the image, if there are `passes` to gather them in."""
    if passes == 0:
        yield None
        return
    statistics = ImageStatistics(run.model)
    with statistics.attached():
        for _ in range(passes):
            for places, _ in run.restored_tiles(transform, statistics, gather=True):
                bar.update(len(places))
            statistics.finish_pass()
        yield statistics


def _scattered(place: tuple[int, int]) -> float:
    """Key that sorts tiles so that the first few lie all over the image."""
    row, column = place
    return (row * 0.7548776662466927 + column * 0.5698402909980532) % 1  # Roberts' sequence


def _blend(restored: Tensor, tile: Tensor, place: _Place) -> None:
    """Adds a weighted tile (3, h, w) to the image, without the part that lies in the padding."""
    tile = tile * place.row_weights.to(tile.device)[:, None] * place.column_weights.to(tile.device)
    part = restored[:, place.top : place.top + tile.shape[1], place.left : place.left + tile.shape[2]]
    part += tile[:, : part.shape[1], : part.shape[2]].to(restored.device)
