"""CoLoRA with a DoRA-style magnitude, for compare_magnitude.py, which decides whether it is worth having.

DoRA: Liu et al., ICML 2024, arXiv 2402.09353. The norms are by output channel, as in PEFT's DoRA.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from colora_peft.tuner import CoLoRALayer


class MagnitudeLayer(CoLoRALayer):
    """A CoLoRA layer with the weight m * V / ||V||, V = W0 + delta, one trained m for each output channel.

    The norm is a constant in the backward pass, as in the paper. For training and evaluation of one adapter: merging
    and mixed batches know nothing of m.
    """

    colora_magnitude: nn.Parameter
    """One number for each output channel; in a transposed convolution with groups, their i-th channels share it."""

    @classmethod
    def convert(cls, layer: CoLoRALayer) -> MagnitudeLayer:
        """Make `layer` one, in place: whoever holds it, its hooks and its adapters stay. m starts as ||W0||."""
        layer.__class__ = cls
        layer._weights_changed()
        layer.colora_magnitude = nn.Parameter(layer.channel_norms(layer.get_base_layer().weight).flatten())
        return layer

    def channel_norms(self, weight: Tensor) -> Tensor:
        """Euclidean norm of each output channel's part of `weight`, shaped to multiply it; no gradient."""
        output = 1 if isinstance(self.get_base_layer(), nn.ConvTranspose2d) else 0
        others = [dimension for dimension in range(weight.ndim) if dimension != output]
        return torch.linalg.vector_norm(weight.detach(), dim=others, keepdim=True)

    def effective_weight(self) -> Tensor:
        """m * V / ||V||; a channel of zeros stays zero. At the start m / ||V|| is 1 up to rounding of the norm."""
        weight = super().effective_weight()
        norms = self.channel_norms(weight)
        return weight * (self.colora_magnitude.view_as(norms) / norms.clamp_min(torch.finfo(norms.dtype).tiny))

    def _factors_to_train(self, x: Tensor) -> None:
        # The gradients of the factors alone are those of W0 + B A: the whole weight is needed.
        return None

    def _weight_to_run(self) -> Tensor:
        # Never kept for the next call: a kept weight is not told when m changes.
        return self.effective_weight()


def add_magnitudes(model: nn.Module) -> nn.Module:
    """Give every adapted layer of `model` a magnitude, in place."""
    for module in list(model.modules()):
        if isinstance(module, CoLoRALayer):
            MagnitudeLayer.convert(module)
    return model
