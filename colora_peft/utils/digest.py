"""Digests by which weights and files are told apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor

from .distributed import whole


def digest_of_weights(weights: Mapping[str, Tensor]) -> str:
    """Of their names, shapes and float32 values, in the order of the names; 64 hexadecimal digits. Where they are
    sharded, every process must call it."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        weight = whole(weights[name].detach())
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(weight.float().cpu().contiguous().numpy())
    return digest.hexdigest()
