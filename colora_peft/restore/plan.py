"""Plan of a restoration: image files and their results, checked before anything runs."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from colora_peft.images import (
    FORMATS,
    IMAGE_SUFFIXES,
    READ_ONLY_SUFFIXES,
    count_kinds,
    no_images_in_words,
    only_images,
    walk_files,
)
from colora_peft.utils import NamePattern, folded, some

__all__ = ["COMPARISONS", "Job", "plan_jobs"]

COMPARISONS = "comparisons"

Key = tuple[str | None, tuple[str, ...] | None]
"""Folder of an image, or None for any, and what is shared of its name; None for another name."""


@dataclass(frozen=True)
class Job:
    """One image to restore.

    Attributes:
        source: The file.
        name: Name in tables: the path below the folder that was given.
        results: One file for each adapter.
        comparison: File of the image of input and results side by side.
        target: Clean image to compare the results with, or None.
    """

    source: Path
    name: str
    results: tuple[Path, ...]
    comparison: Path
    target: Path | None


def plan_jobs(
    inputs: Sequence[str],
    output_dir: str | Path,
    subfolders: Sequence[str],
    file_format: str | None = None,
    targets: str | Path | None = None,
    patterns: tuple[str, str] = ("{}", "{}"),
    left_out: Counter[str] | None = None,
) -> list[Job]:
    """The jobs in the order of the inputs, each file once.

    Results keep the path below the folder that was given, or below the part of a pattern that has no wildcards.

    Args:
        inputs: Files, folders (searched with all below them) and patterns such as `photos/**/*.png`. In the latter two
            hidden files, what is called otherwise than images are, and the output folder are left out.
        output_dir: Where the results go.
        subfolders: One below `output_dir` for each adapter; "" is `output_dir` itself.
        file_format: A key of `colora_peft.images.formats.FORMATS`; None keeps each file's own.
        targets: Folder of images of the same names, with any suffix: at the same path below it, or else,
            where no other input has that name, anywhere below it.
        patterns: Patterns of the names of inputs and targets, see `colora_peft.utils.names`.
        left_out: Numbers of files that are no input by suffix, to which those in folders and of patterns are added.

    Raises:
        FileNotFoundError: An input is not there, or the folder of targets.
        ValueError: There is no image; two results would be one file, or a result an input; several
            targets fit, or none.
    """
    output_dir, others = Path(output_dir), set()
    found = _once(pair for text in inputs for pair in _find(text, output_dir, others))
    if left_out is not None:
        left_out.update(count_kinds(others))
    if not found:
        raise ValueError("There is nothing to restore: give files, folders or patterns.")
    targets_of = _Targets(Path(targets), [name for _, name in found], patterns) if targets is not None else None
    jobs = []
    for source, name in found:
        written = _with_format(name, file_format)
        results = tuple(output_dir / subfolder / written for subfolder in subfolders)
        comparison = output_dir / COMPARISONS / f"{name}.jpg"
        target = targets_of.find(name) if targets_of is not None else None
        jobs.append(Job(source, str(name), results, comparison, target))
    _check_outputs(jobs)
    if targets_of is not None and not any(job.target for job in jobs):
        raise ValueError(f"None of the images has a target of the same name in {targets}; check the folder.")
    return jobs


def _once(found: Iterable[tuple[Path, Path]]) -> list[tuple[Path, Path]]:
    """Each file once, as it was found first. Links to folders are followed; a file and a link to it are two."""
    first: dict[Path, tuple[Path, Path]] = {}
    for source, name in found:
        first.setdefault(source.parent.resolve() / source.name, (source, name))
    return list(first.values())


def _find(text: str, output_dir: Path, left_out: set[Path]) -> Iterator[tuple[Path, Path]]:
    """(file, path of its results below the output folder) of one input."""
    path = Path(text)
    if path.is_dir():
        yield from _below(path, path, output_dir, left_out)
    elif path.exists() or path.is_symlink():  # a link to nothing fails alone, as among the files of a folder
        yield path, Path(path.name)
    elif glob.has_magic(text):
        matches = [Path(match) for match in sorted(glob.glob(text, recursive=True))]
        if not matches:
            raise FileNotFoundError(f"No file matches {text}; check the pattern.")
        parts = path.parts
        fixed = Path(*parts[: next(index for index, part in enumerate(parts) if glob.has_magic(part))])
        for match in matches:
            if _is_below(match, output_dir, fixed):
                continue  # a run's own results are no input of the next
            if match.is_dir():
                yield from _below(match, fixed, output_dir, left_out, may_be_empty=True)
            elif match.suffix.lower() in IMAGE_SUFFIXES:
                yield match, match.relative_to(fixed)
            else:
                left_out.add(match)
    else:
        raise FileNotFoundError(f"There is no file or folder {text}; check the path.")


def _below(
    folder: Path, root: Path, output_dir: Path, left_out: set[Path], may_be_empty: bool = False
) -> Iterator[tuple[Path, Path]]:
    """The images in `folder` and below, sorted, with their paths below `root`."""
    others: set[Path] = set()
    paths = sorted(only_images(walk_files(folder, lambda path: _is(path, output_dir)), others))
    if not paths and not may_be_empty:
        raise ValueError(no_images_in_words(folder, count_kinds(others)))
    left_out.update(others)
    yield from ((path, path.relative_to(root)) for path in paths)


def _is(path: Path, other: Path) -> bool:
    return os.path.realpath(path) == os.path.realpath(other)


def _is_below(match: Path, output_dir: Path, fixed: Path) -> bool:
    """Whether a match lies in the output folder, and the output folder below the beginning of the pattern."""
    # Not `resolve`, which raises on a link to itself.
    results, root, found = (Path(os.path.realpath(path)) for path in (output_dir, fixed, match))
    return results != root and results.is_relative_to(root) and found.is_relative_to(results)


def _with_format(name: Path, file_format: str | None) -> Path:
    """The name of a result. Kinds that are read and not written become PNG."""
    if file_format is None and name.suffix.lower() in READ_ONLY_SUFFIXES:
        file_format = "png"
    suffixes = (name.suffix.lower(),) if file_format is None else FORMATS[file_format].suffixes
    return name if name.suffix.lower() in suffixes else name.with_suffix(suffixes[0])


def _check_outputs(jobs: Sequence[Job]) -> None:
    """Refuses two inputs for one output, and an output that is an input, under whatever name."""
    # Without case: some file systems do not tell A.png from a.png.
    owners: dict[str, Path] = {}
    sources = [path for job in jobs for path in (job.source, job.target) if path is not None]
    identities = {identity: path for path in sources if (identity := _identity(path)) is not None}
    for job in jobs:
        for output in (*job.results, job.comparison):
            other = owners.setdefault(str(output).casefold(), job.source)
            if other != job.source:
                raise ValueError(
                    f"{other} and {job.source} would both be written to {output}; restore them into different "
                    "folders, or give the folder above them, whose structure is kept."
                )
            if _identity(output) in identities:
                raise ValueError(
                    f"The result of {job.source} would overwrite {identities[_identity(output)]}; choose another "
                    "output folder."
                )
            blocked = next((above for above in output.parents if above.exists() and not above.is_dir()), None)
            if blocked is not None or output.is_dir():
                raise ValueError(
                    f"{output} cannot be written: {blocked or output} is in the way; choose another folder."
                )


def _identity(path: Path) -> tuple[int, int] | None:
    """Identity that two names of one file share; None of a link to nothing and of what may not be looked at."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


class _Targets:
    """The images below a folder, by their path without suffix, and by their stem; to the letter, then folded.

    Args:
        folder: Folder of the targets.
        names: Names of all inputs. By its stem a target is found only where one input has that stem, and none has its
            path: the target of day/1.png is not that of night/1.png.
        patterns: Patterns of the stems of inputs and targets.
    """

    def __init__(self, folder: Path, names: Sequence[Path], patterns: tuple[str, str]) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder {folder} of targets; check the path.")
        self._of_inputs = NamePattern(patterns[0], "--input_pattern")
        of_targets = NamePattern(patterns[1], "--target_pattern")
        if self._of_inputs.fields != of_targets.fields:
            raise ValueError("--input_pattern and --target_pattern need as many {} as each other.")
        left = list(_below(folder, folder, folder, set()))
        self._levels: list[tuple[Counter[Key], dict[Key, list[Path]]]] = []
        for level in (0, 1):
            inputs = [_keys(self._of_inputs, name)[level] for name in names]
            of_paths, known = set(inputs), {}
            others = []
            for path, name in left:
                parent, stem = _keys(of_targets, name)[level]
                if (parent, stem) in of_paths:
                    known.setdefault((parent, stem), []).append(path)
                else:
                    known.setdefault((None, stem), []).append(path)
                    others.append((path, name))
            self._levels.append((Counter(stem for _, stem in inputs), known))
            left = others  # what fits to the letter is taken

    def find(self, name: Path) -> Path | None:
        for (parent, stem), (inputs, known) in zip(_keys(self._of_inputs, name), self._levels, strict=True):
            candidates = known.get((parent, stem), []) if stem is not None else []
            if not candidates and stem is not None and inputs[stem] == 1:
                candidates = known.get((None, stem), [])
            if len(candidates) > 1:
                paths = some([str(path) for path in candidates])
                raise ValueError(f"Several targets have the name of {name}: {paths}; keep one.")
            if candidates:
                return candidates[0]
        return None


def _keys(pattern: NamePattern, name: Path) -> tuple[Key, Key]:
    """The folder of a name and what its pattern says of it, to the letter and folded."""
    parent = name.parent.as_posix()
    return (parent, pattern.exact_key(name.stem)), (folded(parent), pattern.folded_key(name.stem))
