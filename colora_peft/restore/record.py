"""What restored images were made with, so that a later run keeps a result only if it would be the same."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from colora_peft.images import read_bytes

__all__ = ["RECORD_FILE", "RestoreRecord", "file_digest", "fingerprint"]

RECORD_FILE = "restored.jsonl"


def fingerprint(weights: Mapping[str, Tensor], *more: str) -> str:
    """Sixteen hexadecimal digits that change with any name, shape, type or value of the weights, and with `more`."""
    digest = sha256(json.dumps(more).encode())
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def file_digest(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits.

    Raises:
        ValueError: it cannot be read; it names the file.
    """
    return sha256(read_bytes(path)).hexdigest()


class RestoreRecord:
    """One line of JSON in the output folder for each result: what a file with these very bytes was made with.

    The line is written before the file, so that what is there is known; and as a line holds for its bytes alone, one
    whose file could not be written says nothing about the older file that is still there.

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
        """Note what `content`, which `result` is about to hold, was made with; makes the folder."""
        line = {"file": self._name(result), "sha256": sha256(content).hexdigest(), "settings": dict(settings)}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # A line of its own, also after half a line.
        begins = b"" if not self._path.exists() or self._path.read_bytes()[-1:] in (b"", b"\n") else b"\n"
        with self._path.open("ab") as file:
            file.write(begins + json.dumps(line).encode() + b"\n")
        self._settings[line["file"], line["sha256"]] = line["settings"]

    def difference(self, result: Path, settings: Mapping[str, Any]) -> str | None:
        """How the settings that `result` was made with differ from these; None if they do not.

        Weights and the input count by their values and not by the path that they came from.

        Raises:
            ValueError: `result` cannot be read.
        """
        name = self._name(result)
        recorded = self._settings.get((name, file_digest(result)))
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
