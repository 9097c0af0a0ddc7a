"""The experiments under examples/experiments, launched as a user does."""

import subprocess
import sys

from .examples import EXAMPLES


def launch(module: str, *flags: object) -> subprocess.CompletedProcess:
    """Runs `python -m examples.experiments.MODULE` with these flags in the root of the repository."""
    command = [sys.executable, "-m", f"examples.experiments.{module}", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, cwd=EXAMPLES.parent)
