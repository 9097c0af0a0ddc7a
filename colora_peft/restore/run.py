"""The way of one image through `restore.py`: it is read, restored with each adapter, written, measured, compared."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from colora_peft.evaluation import SSIM_WINDOW_PX, psnr, ssim
from colora_peft.images import (
    ImageFile,
    check_kind,
    encode_image_file,
    fitting_profile,
    format_of,
    is_turned,
    read_image_file,
    save_comparison,
    why_turned,
)
from colora_peft.inference import restore_image
from colora_peft.utils import write_bytes

from .adapters import NO_ADAPTER, AdapterSet
from .arguments import RestoreArguments
from .plan import Job
from .record import RestoreRecord, digest_of_file
from .report import Row

_STRIP_PIXELS = 1 << 21


class RestoreRun:
    """Restores images one after the other; what fails is noted in their rows."""

    def __init__(self, adapters: AdapterSet, record: RestoreRecord, args: RestoreArguments) -> None:
        self.adapters = adapters
        self.record = record
        self.args = args
        self._unchecked: dict[Path, Exception] = {}

    def settings_of(self, label: str, source: str) -> dict[str, object]:
        """All settings that decide the pixels of a result; `source` is the digest of the input."""
        return {"input": source, "weights": self.adapters.digest_of(label), **self.args.settings()}

    def check_kept(self, jobs: list[Job]) -> None:
        """Refuses to keep results that this run would make otherwise. What cannot be compared fails alone, later.

        Raises:
            ValueError: There are such, and no --overwrite.
        """
        if self.args.overwrite:
            return
        for job in jobs:
            for label, result in zip(self.adapters.labels, job.results, strict=True):
                if not result.exists():
                    continue
                try:
                    settings = self.settings_of(label, digest_of_file(job.source))
                    difference = self.record.difference(result, settings)
                except (ValueError, OSError) as error:
                    self._unchecked[result] = error
                    continue
                if difference is not None:
                    raise ValueError(
                        f"{result} is there, but not as this run would make it ({difference}). Choose another "
                        "--output_dir, or give --overwrite."
                    )

    def process(self, job: Job) -> list[Row]:
        """A row of the table for each adapter. One bad file must not stop the rest: errors stand in the rows."""
        rows = [Row(job.name, label, result) for label, result in zip(self.adapters.labels, job.results, strict=True)]
        for row in rows:
            row.kept = row.result.exists() and not self.args.overwrite
            if row.result in self._unchecked:
                row.failed(self._unchecked[row.result])
        look = self.args.targets is not None or (self.args.compare and not job.comparison.exists())
        if all(row.kept for row in rows) and not look:
            return rows
        try:
            check_kind(job.source)
            for row in rows:
                format_of(row.result)  # before the work, not after
            digest = digest_of_file(job.source)
            image = read_image_file(job.source, self.args.max_pixels)
        except Exception as error:
            return [row.failed(error) for row in rows]
        for row in rows:
            row.size = tuple(image.colour.shape[:0:-1])
            try:
                if not (row.kept or row.error):
                    self._restore(image, digest, row)
            except Exception as error:
                row.failed(error)
        sound = [row for row in rows if row.error is None]
        try:
            self._look(job, image, sound)
        except Exception as error:
            for row in sound:
                row.failed(error)
        return rows

    def _restore(self, image: ImageFile, digest: str, row: Row) -> None:
        start = time.perf_counter()
        restored = restore_image(
            self.adapters.activate(row.label),
            image.colour,
            tile=self.args.tile or None,
            overlap=self.args.overlap,
            batch_size=self.args.batch_size,
            pooling=self.args.pooling,
            pooling_window=self.args.pooling_window,
            statistics_passes=self.args.statistics_passes,
            dtype=None if self.args.dtype == "float32" else getattr(torch, self.args.dtype),
            self_ensemble=self.args.self_ensemble,
            progress=sys.stderr.isatty(),
        )
        encoded, row.notes = encode_image_file(
            row.result, restored, image, quality=self.args.quality, grey_as_rgb=self.args.grey_as_rgb
        )
        self.record.add(row.result, encoded, self.settings_of(row.label, digest))
        row.result.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(row.result, encoded)
        row.seconds = time.perf_counter() - start

    def _look(self, job: Job, image: ImageFile, rows: list[Row]) -> None:
        """Measures and compares the results as they are in their files."""
        wanted = self.args.compare and rows and not (job.comparison.exists() and all(row.kept for row in rows))
        if not (wanted or job.target):
            return
        target = read_image_file(job.target, self.args.max_pixels).on_white if job.target else None
        if target is not None and target.shape != image.colour.shape:
            why = why_turned(image.colour, target, is_turned(job.source), is_turned(job.target))
            raise ValueError(
                f"The target {job.target} is {target.shape[2]} x {target.shape[1]} pixels, {job.source} "
                f"{image.colour.shape[2]} x {image.colour.shape[1]}{why}; without figures."
            )
        results = [read_image_file(row.result, self.args.max_pixels).on_white for row in rows]
        for row, result in zip(rows, results, strict=True):
            if target is not None:
                row.figures = {"psnr_input": psnr_of(image.on_white, target), "psnr": psnr_of(result, target)}
                row.figures |= {"ssim_input": ssim_of(image.on_white, target), "ssim": ssim_of(result, target)}
        if wanted:
            self._compare(job, image, rows, results, target)

    def _compare(
        self, job: Job, image: ImageFile, rows: list[Row], results: list[Tensor], target: Tensor | None
    ) -> None:
        def with_figure(caption: str, figure: str, row: Row) -> str:
            return caption if target is None else f"{caption}  {row.figures[figure]:.2f} dB"

        several = len(self.adapters.labels) > 1
        captions = [with_figure("input", "psnr_input", rows[0])]
        for row in rows:
            name = ("no adapter" if row.label == NO_ADAPTER else row.label) if several else "restored"
            captions.append(with_figure(name, "psnr", row))
        images = [image.on_white, *results]
        if target is not None:
            images, captions = [*images, target], [*captions, "target"]
        profile, _ = fitting_profile(image.icc_profile, 3)
        save_comparison(images, captions, job.comparison, profile)


def psnr_of(image: Tensor, target: Tensor) -> float:
    return psnr(image[None], target[None]).item()


def ssim_of(image: Tensor, target: Tensor) -> float | None:
    """SSIM in strips, whose memory does not grow with the image; None where its window does not fit.

    The mean over the positions of the window is that over strips, weighted by the positions in each.
    """
    height, width = target.shape[1:]
    if min(height, width) < SSIM_WINDOW_PX:
        return None
    positions, rows = height - SSIM_WINDOW_PX + 1, max(1, _STRIP_PIXELS // width)
    total = 0.0
    for top in range(0, positions, rows):
        count = min(rows, positions - top)
        strip = slice(top, top + count + SSIM_WINDOW_PX - 1)
        total += count * ssim(image[None, :, strip], target[None, :, strip]).item()
    return total / positions
