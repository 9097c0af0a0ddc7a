"""The step of a run with the best validation, `--save_best`: its result, kept beside the last one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from peft import PeftModel
from torch import nn

from colora_peft.utils import Processes, write_json, writing_folder

BEST_FOLDER = "best"
_METRICS = "metrics.json"
_SAME_IMAGES_DB = 1e-4  # more than sums in another order differ by


class BestStep:
    """The folder `best` of a run: the result after the step with the highest PSNR, and its figures.

    A run that goes on keeps that of before until a later step is better.

    Args:
        output_dir: The run's folder.
        accelerator: That of the run; the main process writes.
    """

    def __init__(self, output_dir: Path, accelerator: Accelerator) -> None:
        self._folder = output_dir / BEST_FOLDER
        self._processes = Processes(accelerator)
        self._figures = self._processes.from_main(read_best(output_dir) if self._processes.is_main else None)

    def keep(self, network: nn.Module, figures: dict[str, float], step: int) -> str | None:
        """Saves the network if it is better than the best so far; every process must call it.

        Args:
            network: The network as it is evaluated, whole.
            figures: Those of `validate`.
            step: Number of steps that it was trained.

        Returns:
            A sentence for the terminal if the best so far was replaced because other images were evaluated.

        Raises:
            OSError: The folder cannot be written; the best so far is as it was.
        """
        before, note = self._figures, None
        if before is not None:
            if abs(before["psnr_input"] - figures["psnr_input"]) > _SAME_IMAGES_DB:
                note = f"The best step so far, {before['step']}, was found on other images and is replaced by {step}."
            elif not figures["psnr"] > before["psnr"]:
                return None
        with self._processes.failing_together():
            if self._processes.is_main:
                with writing_folder(self._folder) as folder:
                    save_result(network, folder)
                    write_json(folder / _METRICS, {"step": step, **figures})
        self._figures = {"step": step, **figures}
        return note


def save_result(network: nn.Module, folder: Path) -> None:
    """Writes an adapter or a network as users load it, with its image processor if it has one."""
    if isinstance(network, PeftModel):
        # "auto" would ask the Hub for the base, to compare vocabularies.
        network.save_pretrained(folder, save_embedding_layers=False)
    else:
        network.save_pretrained(folder)
    bare = network.get_base_model() if isinstance(network, PeftModel) else network
    if hasattr(bare, "save_image_processor"):
        bare.save_image_processor(folder)


def read_best(output_dir: str | Path) -> dict[str, Any] | None:
    """The `step` and the figures of the best step in a run's folder; None if there is none."""
    file = Path(output_dir) / BEST_FOLDER / _METRICS
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {"step": int(found["step"]), **{name: float(found[name]) for name in ("psnr", "ssim", "psnr_input")}}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}): delete {file.parent}, and the next best is kept.") from error
