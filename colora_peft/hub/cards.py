"""Model cards, written by the run that made the weights: its data, its command, its hardware and its figures."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCardData
from torch import nn

PIPELINE_TAG = "image-to-image"


@dataclass(frozen=True)
class RunFacts:
    """Facts about a run, for its card: the data with its licence, the hardware, seconds of training, the id of the
    data set if that is on the Hub, Accelerate's mixed precision, and when it was prolonged."""

    data: str
    hardware: str
    seconds: float
    processes: int
    dataset: str | None = None
    mixed_precision: str = "no"
    prolonged: str = ""

    @property
    def machine(self) -> str:
        """Processes, hardware and, where it is not the usual one, the precision."""
        precision = "" if self.mixed_precision == "no" else f", mixed precision {self.mixed_precision}"
        return f"{self.processes} x {self.hardware}{precision}"


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
    return f"{'accelerate launch' if launched else 'python'} {shlex.join(_beginning(sys.argv))}"


def _beginning(arguments: list[str]) -> list[str]:
    """The arguments without those that make a run go on, or delete an earlier one."""
    kept: list[str] = []
    dropping = False
    for part in arguments:
        if part.startswith("--"):
            flag = part.partition("=")[0].replace("-", "_")
            dropping = flag in ("__resume_from_checkpoint", "__overwrite_output_dir")
        if not dropping:
            kept.append(part)
    return kept


def loading_code(name_or_path: str, base: str | None = None) -> str:
    """Python that loads the result of a run and restores an image with it.

    Args:
        name_or_path: Folder or id on the Hub to load it from.
        base: Network under the adapter, if its configuration does not name it in a way that other machines
            understand.
    """
    given = "" if base is None else f", base={json.dumps(base)}"
    return f"""import colora_peft
from colora_peft.images import read_image, to_pil

model = colora_peft.load({json.dumps(name_or_path)}{given})
restored = colora_peft.restore_image(model, read_image("photo.jpg"))
to_pil(restored).save("restored.png")"""


def lora_loading_code(name_or_path: str, base: str) -> str:
    """Python that does the same with an adapter of PEFT's LoRA, which `colora_peft.load` leaves to PEFT."""
    loaded = f"model = colora_peft.load({json.dumps(name_or_path)})"
    by_peft = f"""base = colora_peft.load_backbone({json.dumps(base)})
model = PeftModel.from_pretrained(base, {json.dumps(name_or_path)}).eval()"""
    return "from peft import PeftModel\n\n" + loading_code(name_or_path).replace(loaded, by_peft)


def backbone_card(model: nn.Module, name: str, loads_from: str, method: str, facts: RunFacts) -> str:
    """Markdown card of a pre-trained network.

    Args:
        model: The network.
        name: Heading.
        loads_from: Folder or Hub id that it can be loaded from.
        method: One sentence on how it was trained.
        facts: Data, hardware, seconds.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    metadata = ModelCardData(
        library_name="transformers", pipeline_tag=PIPELINE_TAG, tags=["image-restoration", "colora", "prod"]
    )
    return f"""---
{metadata.to_yaml()}
---

# {name}

{type(model).__name__}, {parameters / 1e6:.2f} M parameters. {method}

| | |
|---|---|
| Data | {_cell(facts.data)} |
| Training | {facts.seconds / 60:.0f} minutes on {facts.machine} |
| Software | {_software()} |

```
{command_line()}
```

```python
{loading_code(loads_from)}
```
"""


@dataclass(frozen=True)
class TuningMetrics:
    """Figures of a fine-tuning, as metrics.json holds them.

    PSNR in dB and SSIM are means over the held-out pairs: of the inputs, and of what the network makes of them before
    and after. `trainable_ratio` is the trained share of the weights of all layers that can be adapted.
    """

    method: str
    seed: int
    psnr_input: float
    psnr_before: float
    psnr_after: float
    ssim_input: float
    ssim_before: float
    ssim_after: float
    trainable_parameters: int
    trainable_ratio: float
    trainable_ratio_of_model: float
    estimator: str | None
    seconds_contributions: float
    train_pairs: int
    eval_pairs: int
    seconds: float
    learning_rate: float
    checkerboard_weight: float
    max_train_steps: int
    parameter_budget: float | None
    hardware: str
    processes: int
    torch: str


@dataclass(frozen=True)
class AdaptedNetwork:
    """The result of a fine-tuning, for its card.

    Args:
        title: Heading.
        loads_from: Folder or Hub id that it can be loaded from.
        base: Folder or Hub id of the pre-trained network.
        base_revision: Its commit on the Hub, where it is from there.
        is_adapter: Whether the result is an adapter for `base`, or a network of its own.
        images: Captions of the images beside the card, by file name.
        began_with: Folder or Hub id of the adapter that was trained further, if one was.
        is_lora: Whether the adapter is one of PEFT's LoRA.
    """

    title: str
    loads_from: str
    base: str
    base_revision: str | None
    is_adapter: bool
    images: Mapping[str, str]
    began_with: str | None = None
    is_lora: bool = False

    @property
    def is_base_on_hub(self) -> bool:
        return re.fullmatch(r"[\w.-]+/[\w.-]+", self.base) is not None and not Path(self.base).exists()

    def code(self) -> str:
        """Python that loads it; a base that others cannot find by its name is asked for where they will look."""
        if self.is_lora:
            return lora_loading_code(self.loads_from, self.base)
        is_shared = not Path(self.loads_from).exists()
        is_function = ":" in self.base and not Path(self.base).exists()
        is_asked_for = self.is_adapter and (is_function or (is_shared and not self.is_base_on_hub))
        return loading_code(self.loads_from, self.base if is_asked_for else None)


def adapted_card(
    result: AdaptedNetwork, metrics: TuningMetrics, facts: RunFacts, best: Mapping[str, float] | None = None
) -> str:
    """Markdown card of a fine-tuned network or adapter: its quality, how it was made, and the code that loads it.

    Args:
        result: The result.
        metrics: Its figures.
        facts: Data, hardware, seconds.
        best: `step`, `psnr` and `ssim` of the best step, if that was kept.
    """
    share = metrics.trainable_ratio if result.is_adapter else metrics.trainable_ratio_of_model
    of_what = "of the weights of its layers" if result.is_adapter else "of its parameters"
    revision = f" at `{result.base_revision}`" if result.base_revision else ""
    has_budget = result.is_adapter and metrics.parameter_budget is not None
    budget = f", budget {metrics.parameter_budget:.2%}" if has_budget else ""
    began = "" if result.began_with is None else f", beginning with the adapter `{result.began_with}`"
    steps = f"{metrics.max_train_steps} steps{facts.prolonged}"
    best_row = "" if best is None else f"\n| Best step | {best_step(best)} |"
    trained = f"{metrics.trainable_parameters:,}"
    images = "\n\n".join(f"![{shows}]({name})" for name, shows in result.images.items())
    return f"""---
{_metadata(result, metrics, facts).to_yaml()}
---

# {result.title}

`{result.base}`{revision} adapted with the method `{metrics.method}`{began}: {trained} parameters
trained, {share:.2%} {of_what}{budget}.

```python
{result.code()}
```

| {metrics.eval_pairs} held-out pairs | PSNR (dB) | SSIM |
|---|---|---|
| input | {metrics.psnr_input:.2f} | {metrics.ssim_input:.3f} |
| before | {metrics.psnr_before:.2f} | {metrics.ssim_before:.3f} |
| **after** | **{metrics.psnr_after:.2f}** | **{metrics.ssim_after:.3f}** |

In RGB on [0, 1] after rounding to 8 bits, per image, then averaged.

{images}

| | |
|---|---|
| Data | {_cell(facts.data)}; {metrics.train_pairs} pairs to train on, {metrics.eval_pairs} held out |
| Training | {steps}, {facts.seconds:.0f} seconds, seed {metrics.seed} |{best_row}
| Hardware | {facts.machine} |
| Software | {_software()} |

```
{command_line()}
```
"""


def best_step(best: Mapping[str, float]) -> str:
    """The best step of a run in words."""
    return (
        f"{best['step']}, in the folder `best` of the run: PSNR {best['psnr']:.2f} dB, SSIM {best['ssim']:.3f}, "
        "a little too good because these images chose the step"
    )


def _metadata(result: AdaptedNetwork, metrics: TuningMetrics, facts: RunFacts) -> ModelCardData:
    """The card's metadata, by which the Hub finds it, with the figures as a model-index."""
    dataset = facts.dataset or "custom"
    results = [
        EvalResult(
            task_type=PIPELINE_TAG,
            dataset_type=dataset,
            dataset_name=facts.data,
            metric_type=figure,
            metric_name=f"{figure.upper()} on {metrics.eval_pairs} held-out pairs",
            metric_value=round(value, 4),
        )
        for figure, value in (("psnr", metrics.psnr_after), ("ssim", metrics.ssim_after))
    ]
    return ModelCardData(
        model_name=result.title,
        eval_results=results,
        base_model=result.base if result.is_base_on_hub else None,
        datasets=[facts.dataset] if facts.dataset else None,
        library_name="peft" if result.is_adapter else "transformers",
        pipeline_tag=PIPELINE_TAG,
        tags=["image-restoration", *(["colora"] if result.is_adapter and not result.is_lora else [])],
    )


def _cell(text: str) -> str:
    """A user's text, made to fit into one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _software() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("colora-peft", "peft", "transformers", "torch"))
    return f"{packages}, Python {platform.python_version()}"
