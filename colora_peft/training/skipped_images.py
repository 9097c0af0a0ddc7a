"""Images that could not be used while a run trained: counted, listed, and too many of them an error."""

from __future__ import annotations

from pathlib import Path

from .log import append_row, cut_rows, read_rows

SKIPPED_LOG = "skipped_pictures.jsonl"
_JUDGED_OVER = 1_000  # samples; the first image of a run may be the one bad one in a million


class TooManySkipped(ValueError):
    """More images than the run allows could not be used."""


class SkippedImages:
    """The skipped images of a run, those before a restart included.

    Args:
        output_dir: The run's folder; `skipped_pictures.jsonl` in it has a line for each image, with the step that
            met it first and the reason.
        max_share: Share of the samples that may have needed another image, over at least the first 1,000.
        writes: Whether this process writes the file: the main one does.
    """

    def __init__(self, output_dir: Path, max_share: float, writes: bool) -> None:
        self._file = output_dir / SKIPPED_LOG
        self._max_share = max_share
        self._writes = writes
        self._reasons: dict[str, None] = {}
        self.count = 0

    def resume(self, step: int, count: int) -> None:
        """Goes on after `step` steps in which `count` samples needed another image."""
        self.count = count
        if self._writes:
            cut_rows(self._file, step)
            self._reasons = {row["reason"]: None for row in read_rows(self._file)}

    def add(self, reasons: list[str], step: int) -> None:
        """Note why images were skipped in the step that is number `step` when it is done."""
        self.count += len(reasons)
        for reason in reasons:
            if reason not in self._reasons:
                self._reasons[reason] = None
                if self._writes:
                    append_row(self._file, {"step": step, "reason": reason})

    def check(self, samples: int) -> None:
        """Judges by all samples so far.

        Raises:
            TooManySkipped: if more of them than allowed needed another image; it names the first.
        """
        allowed = self._max_share * max(samples, _JUDGED_OVER)
        if self.count > allowed:
            raise TooManySkipped(
                f"{self.count} of {samples} samples met an image that cannot be used, more than --max_skipped_share "
                f"{self._max_share:g} allows (judged over at least {_JUDGED_OVER:,} samples). The first: "
                f"{next(iter(self._reasons), '')} All are in {self._file}. The run is saved: replace them, or go on "
                "by --resume_from_checkpoint latest with a larger share."
            )
