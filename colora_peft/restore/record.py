"""Record of what restored images were made with: a later run keeps a result only if it would make the same."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from colora_peft.images import read_bytes
from colora_peft.utils import digest_of_bytes

__all__ = ["RECORD_FILE", "RestoreRecord", "digest_of_file"]

RECORD_FILE = "restored.jsonl"


def digest_of_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits.

    Raises:
        ValueError: it cannot be read; it names the file.
    """
    return digest_of_bytes(read_bytes(path))


class RestoreRecord:
    """File in the output folder with one line of JSON for each result: the settings that these very bytes were made with.

    The line is written before the file. It holds for its bytes alone: if the file could not be written, the line says
    nothing about the older file that is still there.

    Args:
        output_dir: The folder; it need not exist.
    """

    def __init__(self, output_dir: str | os.PathLike[str]) -> None:
        self._path = Path(output_dir) / RECORD_FILE
        # By file and bytes; of several lines on the same the last holds.
        self._settings = {(line["file"], line["sha256"]): line["settings"] for line in self._lines()}

    def _lines(self) -> Iterator[dict[str, Any]]:
        if not self._path.exists():
            return
        for text in self._path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:  # half a line of a run that was killed: its image was not written yet
                continue
            if isinstance(line, dict) and {"file", "sha256", "settings"} <= line.keys():
                yield line

    def add(self, result: Path, content: bytes, settings: Mapping[str, Any]) -> None:
        """Note the settings of `content`, which `result` is about to hold; makes the folder."""
        line = {"file": self._name(result), "sha256": digest_of_bytes(content), "settings": dict(settings)}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # A line of its own, also after half a line.
        begins = b"" if not self._path.exists() or self._path.read_bytes()[-1:] in (b"", b"\n") else b"\n"
        with self._path.open("ab") as file:
            file.write(begins + json.dumps(line).encode() + b"\n")
        self._settings[line["file"], line["sha256"]] = line["settings"]

    def difference(self, result: Path, settings: Mapping[str, Any]) -> str | None:
        """The difference between these settings and those that `result` was made with; None if there is none.

        Weights and the input count by their values and not by the path that they came from.

        Raises:
            ValueError: `result` cannot be read.
        """
        name = self._name(result)
        recorded = self._settings.get((name, digest_of_file(result)))
        if recorded is None:
            written = any(name == known for known, _ in self._settings)
            return "it was changed since a run wrote it" if written else "no run wrote it"
        changed = [
            f"{name} was {recorded.get(name)}, is {settings.get(name)}"
            for name in {**recorded, **settings}
            if recorded.get(name) != settings.get(name)
        ]
        return ", ".join(changed) or None

    def _name(self, result: Path) -> str:
        return result.relative_to(self._path.parent).as_posix()
