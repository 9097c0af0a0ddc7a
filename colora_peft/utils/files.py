"""Writing small files whole or not at all, and naming them as a user would."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

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


def share_weights(folder: str | Path) -> None:
    """Give the safetensors files in a folder the permissions that new files have here; they are written for their
    owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in Path(folder).glob("*.safetensors"):
        os.chmod(path, 0o666 & ~umask)


@contextmanager
def writing_result(folder: str | Path) -> Iterator[None]:
    """Around what writes the result of a training: of a full disk it says where, and that the training is not lost.
    Whoever reads new files here reads the result.

    Raises:
        OSError: in place of what was raised inside, by safetensors in its own way.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"The result could not be written into {folder} ({error}). The training is done and its last checkpoint "
            "unharmed: make room, and call the same command with --resume_from_checkpoint latest and without "
            "--overwrite_output_dir."
        ) from error
    share_weights(folder)


def relative_path(path: str | Path) -> str:
    """The path as seen from the working directory if it lies below it, else the absolute one."""
    path = Path(path).resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
