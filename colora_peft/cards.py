"""Model cards, written by the run that made the weights: what it was trained on, with which command, on what."""

from __future__ import annotations

import platform
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn


@dataclass(frozen=True)
class RunFacts:
    """What a card says about the run: the data with its licence, the hardware, seconds of training."""

    data: str
    hardware: str
    seconds: float
    processes: int


def hardware_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of threads that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def command_line() -> str:
    """The command of this run as a user would type it."""
    return f"accelerate launch {shlex.join(sys.argv)}"


def backbone_card(model: nn.Module, name: str, method: str, facts: RunFacts) -> str:
    """Markdown card of a pre-trained network. `method` is one sentence on how it was trained."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"""---
library_name: transformers
pipeline_tag: image-to-image
tags: [image-restoration, colora, prod]
---

# {name}

{type(model).__name__}, {parameters / 1e6:.2f} M parameters. {method}

| | |
|---|---|
| Data | {facts.data} |
| Training | {facts.seconds / 60:.0f} minutes on {facts.processes} x {facts.hardware} |
| Software | torch {torch.__version__}, Python {platform.python_version()} |

```
{command_line()}
```

```python
import colora_peft.models
from transformers import AutoModelForImageToImage

model = AutoModelForImageToImage.from_pretrained("{name}")
```
"""
