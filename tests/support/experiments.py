"""The experiments under examples/experiments: launched as a user does, and cells of the comparison of methods."""

import subprocess
import sys
from typing import Any

from .examples import EXAMPLES


def launch(module: str, *flags: object) -> subprocess.CompletedProcess:
    """Runs `python -m examples.experiments.MODULE` with these flags in the root of the repository."""
    command = [sys.executable, "-m", f"examples.experiments.{module}", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, cwd=EXAMPLES.parent)


def method_cell(
    seed: int, psnr: float, network: str = "prod", method: str = "full", **settings: Any
) -> dict[str, Any]:
    """A finished cell of the comparison of methods on task "a"."""
    return {"task": "a", "train_pairs": 16, "network": network, "method": method, "learning_rate": 1e-3, "seed": seed,
            "psnr": psnr, "psnr_input": 10.0, "ssim": psnr / 100, "ssim_input": 0.1, "seconds": 2.0,
            "trainable_parameters": 7, "trainable_ratio": 0.5, "hardware": "a laptop", **settings}  # fmt: skip
