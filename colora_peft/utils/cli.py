"""Command lines of the scripts: flags, their checks, and the way from a command to an exit code."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import MISSING, field
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from transformers import HfArgumentParser

_Arguments = TypeVar("_Arguments")


def flag(default: Any = MISSING, help: str = "", *, factory: Callable[[], Any] | None = None) -> Any:
    """A field of a dataclass that is a flag on the command line, with its help; `factory` makes a mutable default."""
    if factory is not None:
        return field(default_factory=factory, metadata={"help": help})
    return field(default=default, metadata={"help": help})


def run_script(
    main: Callable[[_Arguments], int | None],
    arguments: type[_Arguments],
    *expected: type[Exception],
    words: str | None = None,
) -> None:
    """Parses the command line into `arguments`, calls `main` with them, and ends the process with the code it returns.

    Errors that a user can act on end it with one sentence and the code 1.

    Args:
        main: The script's work.
        arguments: Dataclass of the script's flags; what it raises in `__post_init__` is the user's error, too.
        expected: Further errors that are the user's.
        words: Name of the flag, a list, that also takes the words of no flag.
    """
    print_any_name()
    warnings.formatwarning = _in_words
    try:
        parsed = _parsed(arguments, words)
        code = main(parsed)
    except (ValueError, TypeError, OSError, ImportError, SafetensorError, *expected) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    sys.exit(code)


def _parsed(arguments: type[_Arguments], words: str | None) -> _Arguments:
    if words is None:
        (parsed,) = HfArgumentParser(arguments).parse_args_into_dataclasses()
        return parsed
    # Not argparse's own positionals: it finds none after a flag.
    parser = HfArgumentParser(arguments, usage=f"%(prog)s [{words.upper()} ...] [--flag VALUE ...]")
    parsed, found = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown := [word for word in found if word.startswith("-")]:
        raise ValueError(f"There is no flag {unknown[0]}; --help lists all.")
    setattr(parsed, words, [*found, *getattr(parsed, words)])
    return parsed


_format_warning = warnings.formatwarning


def _in_words(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of ours as its sentence alone; others with their place in the code."""
    ours = (Path(__file__).resolve().parents[1], Path(sys.argv[0]).resolve().parent)
    if category is UserWarning and any(Path(filename).resolve().is_relative_to(folder) for folder in ours):
        return f"Warning: {message}\n"
    return _format_warning(message, category, filename, lineno, line)


def print_any_name() -> None:
    """Has the terminal, or the file that the output goes to, show characters that it does not know as escapes.

    Names of files hold any character, and on Linux bytes that are none. Printing one must not end a run.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not None, nor what a notebook or a test has put in place
            stream.reconfigure(errors="backslashreplace")


def check_at_least(args: object, name: str, least: int) -> None:
    """Refuses a flag whose value is below `least`."""
    if getattr(args, name) < least:
        raise ValueError(f"--{name} must be at least {least}, got {getattr(args, name)}.")


def check_seed(seed: int) -> None:
    """Refuses a seed that NumPy or torch would refuse."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed must be at least 0 and below 2**32, got {seed}.")
