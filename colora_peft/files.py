"""Writing small files whole or not at all, and naming them as a user would."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

# Ending of what is being written. A process that was killed may leave it behind: it is worth nothing.
PARTIAL = ".partial"


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it.

    After an error the old file is as it was and nothing else is left.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, content: Any) -> None:
    """Write indented JSON as `write_text` does."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def relative_path(path: str | Path) -> str:
    """The path as seen from the working directory if it lies below it, else the absolute one."""
    path = Path(path).resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
