"""Checkpoints of a training run: safetensors and JSON, written whole or not at all.

A checkpoint holds what training changes and nothing else: the trainable parameters, the buffers and the optimiser's
state. The frozen base of an adapter run is not copied.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_PREFIX = "checkpoint-"
_WEIGHTS, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.safetensors", "trainer_state.json"


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters and all buffers of `model`, by name."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {**trained, **dict(model.named_buffers())}


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints in `output_dir`, oldest first."""
    found = [path for path in Path(output_dir).glob(f"{_PREFIX}*") if path.name[len(_PREFIX) :].isdigit()]
    return sorted(found, key=lambda path: int(path.name[len(_PREFIX) :]))


def save_checkpoint(
    output_dir: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    limit: int | None,
) -> Path:
    """Save `output_dir/checkpoint-<step>` and remove the oldest beyond `limit` (None keeps all).

    `state` is JSON and must hold `step`. The new checkpoint is complete before an old one goes.
    """
    final = Path(output_dir) / f"{_PREFIX}{state['step']}"
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(_contiguous(trained_tensors(model)), partial / _WEIGHTS)
    save_file(_contiguous(_optimizer_tensors(model, optimizer)), partial / _OPTIMIZER)
    write_json(partial / _STATE, state)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    if limit is not None:
        for old in list_checkpoints(output_dir)[:-limit]:
            shutil.rmtree(old)
    return final


def load_checkpoint(path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load a checkpoint into `model` and `optimizer` and return its state.

    Raises:
        ValueError: if the folder is no readable checkpoint, or one of another model; nothing was changed then.
    """
    path = Path(path)
    state = read_state(path)
    try:
        weights, moments = load_file(path / _WEIGHTS), load_file(path / _OPTIMIZER)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is no readable checkpoint ({error}); resume from another one.") from error
    own = trained_tensors(model)
    wrong = sorted(name for name in own.keys() | weights.keys() if _shape(own, name) != _shape(weights, name))
    if wrong:
        raise ValueError(
            f"{path} belongs to another model or method: {len(wrong)} tensors are missing, unexpected or of another "
            f"shape, {', '.join(wrong[:5])} among them."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])
    _load_optimizer_tensors(model, optimizer, moments)
    return state


def read_state(path: str | Path) -> dict[str, Any]:
    """The JSON state of a checkpoint; ValueError if there is none."""
    try:
        return json.loads((Path(path) / _STATE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no readable checkpoint ({error}); resume from another one.") from error


def _shape(tensors: dict[str, Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses the strides of channels_last.
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's moments under `<parameter name>/<moment>`: names outlive the order of parameters."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, moments: dict[str, Tensor]) -> None:
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, value in moments.items():
        name, moment = key.rsplit("/", 1)
        by_parameter.setdefault(name, {})[moment] = value
    for name, parameter in model.named_parameters():
        for moment, value in by_parameter.get(name, {}).items():
            # `step` stays on the CPU, as Adam keeps it; the moments take the layout of their parameter.
            if value.shape == parameter.shape and moment != "step":
                value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            optimizer.state[parameter][moment] = value
