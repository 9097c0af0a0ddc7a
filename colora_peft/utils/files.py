"""Writing files and folders whole or not at all, and naming them as a user would."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

# Ending of what is being written. A process that was killed may leave it behind: it is worth nothing.
PARTIAL = ".partial"
_KEPT_OF_NAME = 40  # characters; some file systems allow 255 bytes
_numbers = itertools.count()  # next() of it is atomic


def partial_path(path: str | Path) -> Path:
    """Hidden sibling of `path` to write to first: not there yet, and nobody else gets the same."""
    path = Path(path)
    while True:  # in a container, a killed process may have had the same number
        own = f"{os.getpid()}-{threading.get_ident()}-{next(_numbers)}"
        partial = path.with_name(f".{path.name[:_KEPT_OF_NAME]}.{own}{PARTIAL}")
        if not os.path.lexists(partial):
            return partial


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes a file so that a reader sees the old one or the new one, never half of it.

    After an error the old file is as it was and nothing else is left.
    """
    partial = partial_path(path)
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes UTF-8 text as `write_bytes` does; bytes of a file name that are not UTF-8 are escaped."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: str | Path, content: Any) -> None:
    """Writes indented JSON as `write_text` does."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def check_writable(folder: str | Path, flag: str = "--output_dir") -> None:
    """Refuses a folder that cannot be made or written into, before the work whose results it is for.

    A file is written where the folder is or would be, and deleted: permissions do not tell of a full disk.

    Args:
        folder: The folder; it need not exist.
        flag: Name of its flag.

    Raises:
        ValueError: Nothing can be written there.
    """
    try:
        existing = next(path for path in (Path(folder), *Path(folder).parents) if _is_there(path))
        if not existing.is_dir():
            kind = "a link to nothing" if existing.is_symlink() and not existing.exists() else "a file"
            raise ValueError(f"{flag} {folder} cannot be written: {existing} is {kind}; choose another folder.")
        partial = partial_path(existing / "check")
        try:
            partial.write_bytes(b"\0")
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"{flag} {folder} cannot be written ({reason}); choose another folder.") from error


def _is_there(path: Path) -> bool:
    """Whether there is anything, be it a link to nothing. Raises what is wrong with the path itself."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


@contextmanager
def writing_folder(path: str | Path, keep_others: bool = False) -> Iterator[Path]:
    """Context manager that yields an empty folder, which replaces `path` if the block ends without an error.

    The files are on the disk by then and have the permissions of new files. After an error whatever was at `path` is
    as it was, and nothing else is left.

    Args:
        path: The folder to write, or a link to it; it need not exist.
        keep_others: Whether files of other names stay in `path`. The new ones then go there one by one.

    Raises:
        NotADirectoryError: `path` is a file.
    """
    path = Path(path).resolve()  # "." has no name, and what a link leads to is replaced in its place
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; name a folder.")
    # Inside where it can be: the folder above may be read-only, or on another file system.
    partial, was_there = partial_path(path / "new" if keep_others else path), path.exists()
    partial.mkdir(parents=True)
    try:
        yield partial
        share_weights(partial)
        _flush(partial)
        if keep_others:
            for file in partial.iterdir():
                os.replace(file, path / file.name)
        else:
            _swap(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if keep_others and not was_there:
            with suppress(OSError):  # it is not empty
                path.rmdir()


def _swap(new: Path, path: Path) -> None:
    """Puts the folder `new` in the place of `path`; if that fails, what was there is there again."""
    old = path.rename(partial_path(path)) if path.exists() else None
    try:
        os.replace(new, path)
    except OSError:
        if old is not None:
            old.rename(path)
        raise
    if old is not None:
        shutil.rmtree(old)


def _flush(folder: Path) -> None:
    """Makes the disk take the files: some file systems report only then that they are full, and a machine that loses
    its power later must not be left with empty files."""
    if os.name != "posix":  # elsewhere a file that is open for reading cannot be flushed
        return
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def share_weights(folder: str | Path) -> None:
    """Gives the safetensors files in a folder the permissions that new files have here.

    The library of safetensors writes them for their owner alone.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in Path(folder).glob("*.safetensors"):
        os.chmod(path, 0o666 & ~umask)


@contextmanager
def writing_result(folder: str | Path) -> Iterator[None]:
    """Context manager around writing a training's result into `folder`, which holds its checkpoints, too.

    If the disk is full, the error says that the last checkpoint is unharmed. The files get the permissions of new
    files.

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
