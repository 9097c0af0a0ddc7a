"""How every experiment is launched: flags from a dataclass, errors in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import MISSING, asdict, field
from pathlib import Path
from typing import Any, TypeVar

from transformers import HfArgumentParser

from colora_peft.training import DataFailed

A = TypeVar("A")


def flag(default: Any = MISSING, help: str = "", *, factory: Callable[[], Any] | None = None) -> Any:
    """A field of a dataclass that is a flag on the command line; `factory` makes a mutable default."""
    if factory is not None:
        return field(default_factory=factory, metadata={"help": help})
    return field(default=default, metadata={"help": help})


def run_script(main: Callable[[A], None], arguments: type[A]) -> None:
    """Parse the command line, print the flags and call `main`. An error that the user can resolve ends in one line."""
    try:
        (args,) = HfArgumentParser(arguments).parse_args_into_dataclasses()
        print(f"{asdict(args)}\n")
        main(args)
    except (ValueError, TypeError, OSError, ImportError, DataFailed) as error:
        sys.exit(f"{'/'.join(Path(sys.argv[0]).parts[-2:])}: {error}")
