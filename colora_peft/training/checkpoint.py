"""Checkpoints of a training run: safetensors and JSON, written whole or not at all.

A checkpoint holds what training changes and nothing else: the trainable parameters, the buffers, the optimiser's
state and, where there are any, the averages of the weights. The frozen base of an adapter run is not copied.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from colora_peft.utils import PARTIAL, digest_of_weights, fill, share_weights, whole, write_json

from .engine import Engine, OptimizerState

_PREFIX = "checkpoint-"
_WEIGHTS, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.safetensors", "trainer_state.json"
_AVERAGES = "ema.safetensors"


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters and all buffers of `model`, by name."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {**trained, **dict(model.named_buffers())}


def frozen_fingerprint(model: nn.Module) -> str | None:
    """A digest of the frozen parameters, which checkpoints leave out: whether they are those that training began with.
    None where there are none. Where the network is sharded, every process must call it."""
    frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return digest_of_weights(frozen)[:16] if frozen else None


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints in `output_dir`, oldest first."""
    found = [path for path in Path(output_dir).glob(f"{_PREFIX}*") if path.name[len(_PREFIX) :].isdecimal()]
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name[len(_PREFIX) :]))


def checkpoint_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer | Engine, averages: dict[str, Tensor] | None = None
) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint holds, by file name; `averages` are those of `ExponentialMovingAverage`, by parameter name.

    Tensors are whole: where the network is sharded, every process must call it.
    """
    files = {_WEIGHTS: trained_tensors(model), _OPTIMIZER: _optimizer_tensors(model, optimizer)}
    if averages is not None:
        files[_AVERAGES] = averages
    return {file: {name: whole(tensor.detach()) for name, tensor in named.items()} for file, named in files.items()}


def save_checkpoint(
    output_dir: str | Path, files: dict[str, dict[str, Tensor]], state: dict[str, Any], limit: int | None
) -> Path:
    """Save `output_dir/checkpoint-<step>` and remove the oldest beyond `limit` (None keeps all).

    Those of later steps go, too: a run that has them went back to an earlier one, and they are of what it left.

    `files` are those of `checkpoint_tensors`; `state` is JSON and must hold `step`. The new checkpoint is complete and
    on the disk before an old one goes.

    Raises:
        OSError: if it cannot be written (a full disk); the old checkpoints are as they were, nothing else is left.
    """
    output_dir = Path(output_dir)
    final = output_dir / f"{_PREFIX}{state['step']}"
    partial = final.with_name(f".{final.name}{PARTIAL}")
    for leftover in output_dir.glob(f".{_PREFIX}*{PARTIAL}"):  # of runs that were killed while they saved
        shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    try:
        for file, tensors in files.items():
            save_file(_contiguous(tensors), partial / file)
        share_weights(partial)
        write_json(partial / _STATE, state)
        _flush(partial)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):  # safetensors reports a full disk as the latter
            raise OSError(
                f"{final} could not be written ({error}). Earlier checkpoints are unharmed: make room and go on with "
                "--resume_from_checkpoint latest."
            ) from error
        raise
    hidden = _hide(final) if final.exists() else None
    os.replace(partial, final)
    if hidden is not None:
        shutil.rmtree(hidden)
    kept = list_checkpoints(output_dir)
    place = kept.index(final)
    first = 0 if limit is None else max(0, place + 1 - limit)
    for old in (*kept[place + 1 :], *kept[:first]):
        shutil.rmtree(_hide(old))
    return final


def _flush(folder: Path) -> None:
    """Have the disk take the files. Some file systems report only now that they were full; and a machine that loses
    its power later must not be left with an empty file in place of an older checkpoint."""
    if os.name != "posix":  # elsewhere a file that is open for reading cannot be flushed
        return
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _hide(checkpoint: Path) -> Path:
    """Rename a checkpoint that is to go, so that a run killed meanwhile leaves no visible half of it."""
    return checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.old{PARTIAL}"))


def load_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Engine,
    averages: dict[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Load a checkpoint into `model`, `optimizer` and, where given, `averages`, and return its state.

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
    _load_optimizer_tensors(trained, optimizer, moments)
    return state


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


def _differing(own: dict[str, Tensor], stored: dict[str, Tensor]) -> list[str]:
    """The names that only one of the two has, or has in another shape."""
    return [name for name in own.keys() | stored.keys() if _shape(own, name) != _shape(stored, name)]


def _shape(tensors: dict[str, Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses the strides of channels_last.
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer | Engine) -> dict[str, Tensor]:
    """Adam's moments under `<parameter name>/<moment>`: names outlive the order of parameters."""
    state = optimizer.state  # asked for once: DeepSpeed's has to be gathered
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in state.get(parameter, {}).items()
    }


def _is_moment(key: str, value: Tensor, trained: dict[str, Tensor]) -> bool:
    """Whether `value` can be Adam's state of a trained parameter: its step count or a tensor of its shape."""
    name, _, moment = key.rpartition("/")
    return name in trained and value.shape == (torch.Size() if moment == "step" else trained[name].shape)


def _load_optimizer_tensors(
    trained: dict[str, Tensor], optimizer: torch.optim.Optimizer | Engine, moments: dict[str, Tensor]
) -> None:
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
    optimizer.state = state
