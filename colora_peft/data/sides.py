"""The two sides of a folder of pairs: which files are inputs, which are targets, and which have no partner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from colora_peft.images import list_images
from colora_peft.utils import NamePattern, guess_patterns, guess_patterns_side_by_side, some, split_names

Files = dict[str, Path]  # by their name without suffix


def find_sides(
    folder: Path, of_inputs: NamePattern, of_targets: NamePattern, left_out: Counter[str]
) -> tuple[Files, Files]:
    """Returns the inputs and the targets of a folder, by their names without suffix.

    They lie in `input/` and `target/` or, where there is neither of these and the patterns differ, side by side. Other
    files are added to `left_out`, by suffix.

    Raises:
        FileNotFoundError: A folder is missing.
        ValueError: A folder holds no images, two of one name, or some that fit both patterns or none.
    """
    sides = (folder / "input", folder / "target")
    if folder.is_dir() and not any(side.exists() for side in sides):
        return _side_by_side(folder, of_inputs, of_targets, left_out)
    for needed in (folder, *sides):
        if not needed.is_dir():
            raise FileNotFoundError(
                f"There is no folder {needed}; check the path. Pairs are read from a folder that holds `input/` and "
                "`target/` with images of the same file names."
            )
    return _by_stem(sides[0], left_out), _by_stem(sides[1], left_out)


def _side_by_side(
    folder: Path, of_inputs: NamePattern, of_targets: NamePattern, left_out: Counter[str]
) -> tuple[Files, Files]:
    if of_inputs.text == of_targets.text:
        names = [path.stem for path in folder.iterdir() if path.is_file()]
        input_pattern, target_pattern = guess_patterns_side_by_side(names) or ("{}_noisy", "{}_clean")
        raise FileNotFoundError(
            f"There is no folder {folder / 'input'}; pairs are read from a folder that holds `input/` and `target/` "
            f"with images of the same file names. If the two lie side by side in {folder}, name their patterns, such "
            f'as --input_pattern "{input_pattern}" --target_pattern "{target_pattern}".'
        )
    files = _by_stem(folder, left_out)
    inputs, targets, others = split_names(files, of_inputs, of_targets)
    if others:
        raise ValueError(
            f"In {folder} these images fit neither {of_inputs.text} nor {of_targets.text}: {some(others)}. Change the "
            "patterns, or move these."
        )
    return {name: files[name] for name in inputs}, {name: files[name] for name in targets}


def _by_stem(folder: Path, left_out: Counter[str]) -> Files:
    by_stem: Files = {}
    for path in list_images(folder, left_out=left_out):
        if path.stem in by_stem:
            raise ValueError(f"{folder} holds {by_stem[path.stem].name} and {path.name}: keep one of each name.")
        by_stem[path.stem] = path
    return by_stem


def check_no_orphans(
    folder: Path,
    inputs: Sequence[str],
    targets: Sequence[str],
    partners: Mapping[str, str],
    patterns: tuple[NamePattern, NamePattern],
) -> None:
    """Raises ValueError where a name has no partner; where none has, with patterns that may be meant."""
    used = set(partners.values())
    orphans = [(name, "input") for name in inputs if name not in partners]
    orphans += [(name, "target") for name in targets if name not in used]
    if not orphans:
        return
    listed = some([f"{name} (only in {side})" for name, side in sorted(orphans)])
    of_inputs, of_targets = (pattern.text for pattern in patterns)
    same = "of the same name" if of_inputs == of_targets == "{}" else f"by the patterns {of_inputs} and {of_targets}"
    advice = "Add the missing ones, rename them or remove these."
    if not partners and (guess := guess_patterns(inputs, targets)) is not None:
        advice = f'Perhaps you mean --input_pattern "{guess[0]}" --target_pattern "{guess[1]}".'
    raise ValueError(f"In {folder} these images have no partner {same}: {listed}. {advice}")
