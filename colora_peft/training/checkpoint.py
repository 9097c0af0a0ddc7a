"""Checkpoints of a training run: safetensors and JSON, written whole or not at all.

A checkpoint holds what training changes and nothing else: the trainable parameters, the buffers, the optimiser's
state and, where there are any, the averages of the weights. The frozen base of an adapter run is not copied.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from colora_peft.utils import PARTIAL, digest_of_weights, fill, whole, write_json, writing_folder

from .engine import OptimizerState

_PREFIX = "checkpoint-"
_WEIGHTS, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.safetensors", "trainer_state.json"
_AVERAGES = "ema.safetensors"


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters and all buffers of `model`, by name."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {**trained, **dict(model.named_buffers())}


def frozen_digest(model: nn.Module) -> str | None:
    """Digest of the frozen parameters, which checkpoints leave out; None where there are none.

    A resumed run knows by it that they are those that training began with. Where the network is sharded, every process
    must call it.
    """
    frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return digest_of_weights(frozen)[:16] if frozen else None


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints in `output_dir`, oldest first."""
    found = [path for path in Path(output_dir).glob(f"{_PREFIX}*") if path.name[len(_PREFIX) :].isdecimal()]
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name[len(_PREFIX) :]))


def checkpoint_tensors(
    model: nn.Module, moments: OptimizerState, averages: dict[str, Tensor] | None = None
) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint by file name, all whole: where the network is sharded, every process must call it.

    Args:
        model: The network that is trained.
        moments: Adam's state by parameter; stored by `<parameter name>/<moment>`, since names outlive their order.
        averages: Those of `ExponentialMovingAverage`, by parameter name.
    """
    by_name = {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in moments.get(parameter, {}).items()
    }
    files = {_WEIGHTS: trained_tensors(model), _OPTIMIZER: by_name}
    if averages is not None:
        files[_AVERAGES] = averages
    return {file: {name: whole(tensor.detach()) for name, tensor in named.items()} for file, named in files.items()}


def save_checkpoint(
    output_dir: str | Path, files: dict[str, dict[str, Tensor]], state: dict[str, Any], limit: int | None
) -> Path:
    """Saves `output_dir/checkpoint-<step>`, removes the oldest beyond `limit`, and those of later steps.

    A run that finds checkpoints of later steps went back to an earlier one. The new checkpoint is complete and on the
    disk before an old one goes.

    Args:
        output_dir: The run's folder.
        files: Those of `checkpoint_tensors`.
        state: JSON that holds the `step`.
        limit: Number of checkpoints to keep; None keeps all.

    Raises:
        OSError: if it cannot be written (a full disk); the old checkpoints are as they were, nothing else is left.
    """
    output_dir = Path(output_dir)
    final = output_dir / f"{_PREFIX}{state['step']}"
    for leftover in output_dir.glob(f".{_PREFIX}*{PARTIAL}"):  # of runs that were killed while they saved
        shutil.rmtree(leftover)
    try:
        with writing_folder(final) as folder:
            for file, tensors in files.items():
                # safetensors refuses the strides of channels_last.
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file)
            write_json(folder / _STATE, state)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as the latter
        raise OSError(
            f"{final} could not be written ({error}). Earlier checkpoints are unharmed: make room and go on with "
            "--resume_from_checkpoint latest."
        ) from error
    kept = list_checkpoints(output_dir)
    place = kept.index(final)
    first = 0 if limit is None else max(0, place + 1 - limit)
    for old in (*kept[place + 1 :], *kept[:first]):
        # Renamed first, so that a run killed meanwhile leaves no visible half of it.
        shutil.rmtree(old.rename(old.with_name(f".{old.name}.old{PARTIAL}")))
    return final


def load_checkpoint(
    path: str | Path, model: nn.Module, averages: dict[str, Tensor] | None = None
) -> tuple[dict[str, Any], OptimizerState]:
    """Loads a checkpoint into `model` and, where given, `averages`; returns its JSON state and Adam's.

    Raises:
        ValueError: if the folder is no readable checkpoint, or one of another model; nothing was changed then.
    """
    path = Path(path)
    state = read_state(path)
    try:
        weights, moments = load_file(path / _WEIGHTS), load_file(path / _OPTIMIZER)
        averaged = {} if averages is None else load_file(path / _AVERAGES)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is no readable checkpoint ({error}); resume from another one.") from error
    own = trained_tensors(model)
    wrong = _differing(own, weights) + [f"average of {name}" for name in _differing(averages or {}, averaged)]
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    wrong += [key for key, value in moments.items() if not _is_moment(key, value, trained)]
    if wrong:
        raise ValueError(
            f"{path} belongs to another model or method: {len(wrong)} tensors are missing, unexpected or of another "
            f"shape, {', '.join(sorted(wrong)[:5])} among them."
        )
    for name, tensor in own.items():
        fill(tensor, weights[name])
    for name in averages or {}:
        fill(averages[name], averaged[name])
    return state, _by_parameter(moments, trained)


def read_state(path: str | Path) -> dict[str, Any]:
    """The JSON state of a checkpoint.

    Raises:
        ValueError: if there is none, or it does not say which step it is of.
    """
    try:
        state = json.loads((Path(path) / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no readable checkpoint ({error}); resume from another one.") from error
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise ValueError(f"{path} is no readable checkpoint ({_STATE} has no step); resume from another one.")
    return state


def prolonged_in_words(output_dir: str | Path) -> str:
    """The times that the run in a folder was prolonged, for its card: "" if it never was."""
    checkpoints = list_checkpoints(output_dir)
    times = read_state(checkpoints[-1]).get("prolonged", []) if checkpoints else []
    return "".join(f", prolonged after step {each['step']} of {each['planned']}" for each in times)


def _differing(own: dict[str, Tensor], stored: dict[str, Tensor]) -> list[str]:
    """The names that only one of the two has, or has in another shape."""
    shapes = [{name: tensor.shape for name, tensor in tensors.items()} for tensors in (own, stored)]
    return [name for name in own.keys() | stored.keys() if shapes[0].get(name) != shapes[1].get(name)]


def _is_moment(key: str, value: Tensor, trained: dict[str, Tensor]) -> bool:
    """Whether `value` can be Adam's state of a trained parameter: its step count or a tensor of its shape."""
    name, _, moment = key.rpartition("/")
    return name in trained and value.shape == (torch.Size() if moment == "step" else trained[name].shape)


def _by_parameter(moments: dict[str, Tensor], trained: dict[str, nn.Parameter]) -> OptimizerState:
    state: OptimizerState = defaultdict(dict)
    for key, value in sorted(moments.items()):  # in one order on all processes, which fill sharded ones together
        name, _, moment = key.rpartition("/")
        parameter = trained[name]
        # `step` stays on the CPU, as Adam keeps it; the moments take the layout of their parameter.
        if moment == "step":
            own = value.clone()
        else:
            own = torch.empty_like(parameter.detach(), dtype=value.dtype)
            fill(own, value)
        state[parameter][moment] = own
    return state
