"""Model cards, written by the run that made the weights: what it was trained on, with which command, on what."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping
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
    """The command of this run; flags of the launcher are not known here, the table names what they set."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ  # set by `accelerate launch`, whatever its flags
    return f"{'accelerate launch' if launched else 'python'} {shlex.join(sys.argv)}"


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


def adapted_card(
    title: str, base: str, snippet: str, metrics: Mapping[str, object], facts: RunFacts, is_adapter: bool
) -> str:
    """Markdown card of a fine-tuned network or adapter: what came out, and the code that loads it.

    Args:
        title: Heading.
        base: Folder or Hub id of the pre-trained network.
        snippet: Python that loads the result.
        metrics: What `examples/finetune.py` writes as metrics.json.
        facts: Data, hardware, seconds.
        is_adapter: Whether the result is an adapter for `base`, or a network of its own.
    """
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) is not None and not Path(base).exists()
    base_line = f"base_model: {base}\n" if on_hub else ""
    library, tags = ("peft", "image-restoration, colora") if is_adapter else ("transformers", "image-restoration")
    share = "trainable_ratio" if is_adapter else "trainable_ratio_of_model"
    of_what = "of the weights of its layers" if is_adapter else "of its parameters"
    return f"""---
library_name: {library}
pipeline_tag: image-to-image
{base_line}tags: [{tags}]
---

# {title}

`{base}` adapted with the method `{metrics["method"]}`: {metrics["trainable_parameters"]:,} parameters trained,
{metrics[share]:.2%} {of_what}.

| {metrics["eval_pairs"]} held-out pairs | PSNR (dB) | SSIM |
|---|---|---|
| input | {metrics["psnr_input"]:.2f} | {metrics["ssim_input"]:.3f} |
| before | {metrics["psnr_before"]:.2f} | {metrics["ssim_before"]:.3f} |
| **after** | **{metrics["psnr_after"]:.2f}** | **{metrics["ssim_after"]:.3f}** |

In RGB on [0, 1] after rounding to 8 bits, per picture, then averaged.

![input, restored, target](before_after.png)

| | |
|---|---|
| Data | {facts.data} |
| Training | {facts.seconds:.0f} seconds on {facts.processes} x {facts.hardware}, seed {metrics["seed"]} |
| Software | torch {torch.__version__}, Python {platform.python_version()} |

```
{command_line()}
```

```python
{snippet}
```
"""
