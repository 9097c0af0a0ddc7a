"""Digests: SHA-256 in hexadecimal digits, by which weights, adapters and files are told apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from .distributed import whole


def digest_of_weights(weights: Mapping[str, Tensor]) -> str:
    """64 digits of the weights' names, shapes and float32 values, in the order of the names.

    Where they are sharded, every process must call it.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        weight = whole(weights[name].detach())
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(weight.float().cpu().contiguous().numpy())
    return digest.hexdigest()


def digest_of_state(weights: Mapping[str, Tensor], *settings: str) -> str:
    """16 digits that change with any name, shape, type or value of the weights, and with the settings."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def digest_of_bytes(content: bytes) -> str:
    """64 digits of a file's bytes."""
    return hashlib.sha256(content).hexdigest()
