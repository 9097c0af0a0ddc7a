"""The output of `restore.py`: a line for each result while it runs, then means, counts, failures and notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from colora_peft.utils import some

_LONGEST_NAME = 40
_FIGURES = {"psnr_input": ("input dB", ".2f"), "psnr": ("PSNR dB", ".2f"), "ssim": ("SSIM", ".3f")}


@dataclass
class Row:
    """Outcome for one image and one adapter.

    Attributes:
        name: Name of the image.
        label: Label of the adapter.
        result: The file.
        kept: Whether it was there before.
        size: Width and height in pixels, if the image was read.
        seconds: Time for restoring and writing, if it was restored.
        figures: PSNR (dB) and SSIM of the input and the result; SSIM is None for images below its window.
        notes: Phrases on what the result does not keep of the input's file.
        error: Reason of a failure.
    """

    name: str
    label: str
    result: Path
    kept: bool = False
    size: tuple[int, int] | None = None
    seconds: float | None = None
    figures: dict[str, float | None] = field(default_factory=dict)
    notes: Sequence[str] = ()
    error: str | None = None

    def failed(self, error: Exception) -> Row:
        """Note the error, with its kind where the message was not written for users."""
        self.error = str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"
        return self


class Table:
    """Columns as wide as the names that are known beforehand.

    Args:
        names: Names of all images.
        labels: Labels of all adapters; with one there is no column.
        with_figures: Whether there are targets.
    """

    def __init__(self, names: Sequence[str], labels: Sequence[str], with_figures: bool) -> None:
        self._labels = labels
        self._said = ("", "")  # the last image that failed, and why
        self._figures = _FIGURES if with_figures else {}
        self._name_width = min(_LONGEST_NAME, max(len("file"), *(len(name) for name in names)))
        self._label_width = max(len("adapter"), *(len(label) for label in labels)) if len(labels) > 1 else 0

    def head(self) -> str:
        return self._cells("file", "adapter", "size", "seconds", [name for name, _ in self._figures.values()])

    def line(self, row: Row) -> str:
        """The line of a result, and below it why it failed, unless the line before has just said so."""
        size = "x".join(map(str, row.size)) if row.size else ""
        state = f"{row.seconds:.1f}" if row.seconds is not None else "kept" if row.kept and not row.error else "failed"
        line = self._cells(row.name, row.label, size, state, self._formatted(row.figures))
        if row.error is None or self._said == (row.name, row.error):
            return line
        self._said = (row.name, row.error)
        return f"{line}\n    {row.error}"

    def ending(self, rows: Sequence[Row], output_dir: Path, total: int) -> str:
        """Means, counts, failures and notes."""
        lines = self._mean_lines(rows)
        written, failed = sum(row.seconds is not None for row in rows), [row for row in rows if row.error]
        kept = sum(row.kept and not row.error for row in rows)
        lines += [
            "",
            f"{written} written, {kept} kept as they were, {len(failed)} failed. Results are in {output_dir}.",
        ]
        if kept:
            lines.append(
                "Kept results were there, made of the same inputs with the same weights and settings; --overwrite "
                "makes them again."
            )
        if len(rows) < total:
            lines.append(f"Interrupted: {total - len(rows)} are left; the same command goes on with them.")
        if failed:
            lines.append(f"Failed: {some(list(dict.fromkeys(row.name for row in failed)))}.")
        unmeasured = [row for row in rows if self._figures and not row.figures and not row.error]
        if unmeasured:
            lines.append(f"Without a target: {some(list(dict.fromkeys(row.name for row in unmeasured)))}.")
        return "\n".join(lines + _note_lines(rows))

    def _mean_lines(self, rows: Sequence[Row]) -> list[str]:
        lines = []
        for label in self._labels:
            own = [row for row in rows if row.label == label]
            means = {name: _mean([row.figures.get(name) for row in own]) for name in self._figures}
            if len(own) > 1 and any(mean is not None for mean in means.values()):
                lines.append(self._cells("mean", label, "", "", self._formatted(means)))
        return lines

    def _formatted(self, figures: Mapping[str, float | None]) -> list[str]:
        return [
            "" if figures.get(name) is None else format(figures[name], style)
            for name, (_, style) in self._figures.items()
        ]

    def _cells(self, name: str, label: str, size: str, seconds: str, figures: Sequence[str]) -> str:
        if len(name) > self._name_width:  # the end tells files apart
            name = f"…{name[1 - self._name_width :]}"
        cells = [name.ljust(self._name_width)]
        if self._label_width:
            cells.append(label.ljust(self._label_width))
        return "  ".join([*cells, size.rjust(11), seconds.rjust(7), *(figure.rjust(8) for figure in figures)]).rstrip()


def report_of(rows: Sequence[Row], settings: Mapping[str, object]) -> dict[str, object]:
    """The report for programs: `settings`, and one entry in `results` for each line."""
    results = []
    for row in rows:
        names = {"file": row.name, "adapter": row.label, "result": str(row.result)}
        outcome = {"kept": row.kept, "size": row.size, "seconds": row.seconds, **row.figures}
        results.append({**names, **outcome, "notes": list(row.notes), "error": row.error})
    return {"settings": dict(settings), "results": results}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _note_lines(rows: Sequence[Row]) -> list[str]:
    """Each note once, with the images that it is about."""
    names: dict[str, dict[str, None]] = {}
    for row in rows:
        for note in row.notes:
            names.setdefault(note, {})[row.name] = None
    return [f"Note: {note} ({some(list(of), 5)})." for note, of in names.items()]
