"""The effective weight of an adapted layer, kept between calls at inference, and the test that it is current."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class _Source(NamedTuple):
    """A parameter that the kept weight was made from, and how it was then."""

    owner: dict[str, nn.Parameter | None]
    """The `_parameters` of its module: another parameter may take its place there."""
    name: str
    parameter: nn.Parameter
    alias: Tensor
    """Keeps the storage alive: a freed address could come back with other content."""
    address: int
    version: int
    """Number of writes that PyTorch knows of."""
    content: Tensor | None
    """A copy, for adapters on the CPU."""


class KeptWeight(NamedTuple):
    """A weight, the layer that it is for, and what it was made from."""

    weight: Tensor
    base: nn.Module
    scaling: dict[str, float]
    """Scaling of each adapter in it."""
    sources: tuple[_Source, ...]

    def is_current(self, scaling: dict[str, float]) -> bool:
        """Returns whether the weight may be used now; `scaling` is the layer's. Runs at every call of a layer."""
        for adapter, factor in self.scaling.items():
            if scaling.get(adapter) != factor:
                return False
        for owner, name, parameter, _, address, version, content in self.sources:
            if owner.get(name) is not parameter or parameter._version != version or parameter.data_ptr() != address:
                return False
            # Some code writes into the `.data` of what it trains (averaged weights, for one): no counter sees it.
            if parameter.requires_grad and (
                content is None or torch.is_grad_enabled() or not torch.equal(parameter, content)
            ):
                return False
        return True


def keep_weight(
    weight: Tensor, base: nn.Module, containers: Iterable[nn.Module], scaling: dict[str, float]
) -> KeptWeight | None:
    """Keeps `weight`, made from the weight of `base` and the adapters in `containers` that `scaling` names.

    Returns None if that must not be: gradients are to flow into one of them, one of them is trained on a device on
    which comparing contents would stall, or one has no count of its writes.
    """
    sources = [_source(base._parameters, "weight", may_copy=False)]
    for container in containers:
        sources += [_source(container._parameters, name, may_copy=True) for name in scaling if name in container]
    return None if any(source is None for source in sources) else KeptWeight(weight, base, scaling, tuple(sources))


def _source(owner: dict[str, nn.Parameter | None], name: str, may_copy: bool) -> _Source | None:
    parameter = owner.get(name)
    if type(parameter) is not nn.Parameter or parameter.is_inference():  # inference tensors have no version
        return None
    content = None
    if parameter.requires_grad:
        if torch.is_grad_enabled() or parameter.device.type != "cpu" or not may_copy:
            return None
        content = parameter.detach().clone()
    alias = parameter.detach()
    return _Source(owner, name, parameter, alias, alias.data_ptr(), parameter._version, content)
