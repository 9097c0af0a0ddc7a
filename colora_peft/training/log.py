"""Logs of a run: files with a line of JSON for each row, every row with its `step`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from colora_peft.utils import write_text


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Adds a row at the end.

    Raises:
        OSError: if it cannot be written (a full disk).
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise OSError(
            f"{path} could not be written ({error.strerror}): make room, and go on from the last checkpoint with "
            "--resume_from_checkpoint latest."
        ) from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a log that was cut; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def cut_rows(path: Path, last_step: int) -> None:
    """Drops the rows after `last_step`, and a last row that a killed run left half-written. No file, nothing to do."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] > last_step:
                break
        except json.JSONDecodeError:
            break
        kept.append(f"{line}\n")
    write_text(path, "".join(kept))
