"""The forward pass of an adapted layer, which runs with a weight that is not its own, and its gradients.

`run_with_weight` serves every layer. `run_with_factors` serves training where W = W0 + B A, on the CPU: its backward
pass forms the gradients of A and B without that of the whole W. With u = A * x (the layer's own convolution with the r
filters of A) and v = B^T g, g being the gradient of the output,

    dL/dB = sum over pixels of g u^T,    dL/dA = weight gradient of the layer for input x and output gradient v,

which takes 2 r (d + k) multiplications for each pixel in place of the d k of dL/dW. W, which is cheap, is built again
for the gradient of the input: neither W nor anything of u is kept from the forward to the backward pass.
"""

import math
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colora_peft.ranks import ADAPTABLE_KINDS, weight_matrix_shape

from .offloading import is_offloaded

MINIMUM_MULTIPLICATIONS = 100_000_000
"""Number of multiplications in the gradient of a whole weight from which on that of its factors is faster."""

_weights_in_place = threading.RLock()
_convolution_backward = torch.ops.aten.convolution_backward


def is_plain(layer: nn.Module) -> bool:
    """Returns whether a call of `layer` does what its kind does and nothing more: no own forward pass, no hook.

    The hook that brings offloaded weights back does not count: the weight to run with is here.
    """
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    if "_conv_forward" in layer.__dict__ or ("forward" in layer.__dict__ and not is_offloaded(layer)):
        return False
    kind = type(layer)
    return kind.forward in _PLAIN_RUNS and getattr(kind, "_conv_forward", None) in _PLAIN_CONV_FORWARDS


def alone_with_weights() -> AbstractContextManager[Any]:
    """Returns a context that one thread at a time is in, for what writes W0 or puts another weight in its place."""
    return nullcontext() if torch.compiler.is_compiling() else _weights_in_place


def run_with_weight(layer: nn.Module, weight: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Returns the output of `layer` for `x` as if `weight` were its weight; the rest goes to `layer.forward`.

    Where the layer is not plain, no other thread may read its weight meanwhile: see `alone_with_weights`.

    Raises:
        NotImplementedError: An offloaded layer has a forward pass of its own.
        TypeError: `layer.forward` does not take the further arguments.
    """
    run = _PLAIN_RUNS.get(type(layer).forward)
    if run is not None and is_plain(layer) and (run is _run_conv_transpose or not args and not kwargs):
        return run(layer, weight, x, *args, **kwargs)
    if is_offloaded(layer):
        raise NotImplementedError(
            f"A {type(layer).__name__} with a forward pass of its own cannot be adapted while it is offloaded: "
            "keep it on a device in the device_map, or leave it alone (exclude_modules or rank 0)."
        )
    # A subclass or a hook (device_map, feature extraction) adds to the forward pass: let it run, on our weight. And a
    # plain layer takes x alone and refuses anything more in its own words.
    return torch.func.functional_call(layer, {"weight": weight}, (x, *args), kwargs)


def _run_conv2d(layer: nn.Conv2d, weight: Tensor, x: Tensor) -> Tensor:
    # The commonest layer, spared what Python costs: nn.Module's __getattr__, and a call.
    parameters = layer._parameters
    bias = parameters["bias"] if "bias" in parameters else layer.bias  # computed, or a replica's
    if layer.padding_mode != "zeros":
        return layer._conv_forward(x, weight, bias)
    return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def _run_conv_transpose(
    layer: nn.ConvTranspose2d, weight: Tensor, x: Tensor, output_size: list[int] | None = None
) -> Tensor:
    """Does what nn.ConvTranspose2d.forward does; `output_size` picks one of the sizes that stride leaves open."""
    output_padding = layer._output_padding(
        x, output_size, layer.stride, layer.padding, layer.kernel_size, 2, layer.dilation
    )
    return F.conv_transpose2d(
        x, weight, layer.bias, layer.stride, layer.padding, output_padding, layer.groups, layer.dilation
    )


_PLAIN_RUNS: Mapping[Callable, Callable] = {
    nn.Linear.forward: lambda layer, weight, x: F.linear(x, weight, layer.bias),
    nn.Conv1d.forward: lambda layer, weight, x: layer._conv_forward(x, weight, layer.bias),
    nn.Conv2d.forward: _run_conv2d,
    nn.Conv3d.forward: lambda layer, weight, x: layer._conv_forward(x, weight, layer.bias),
    nn.ConvTranspose2d.forward: _run_conv_transpose,
}
_PLAIN_CONV_FORWARDS = {getattr(kind, "_conv_forward", None) for kind in ADAPTABLE_KINDS}


def factors_save_time(layer: nn.Module, rank: int, x: Tensor) -> bool:
    """Returns whether `run_with_factors` takes `layer` and `x`, and trains `rank` faster than `run_with_weight`.

    The rule is our measurement on two CPU cores (examples/experiments/speed/factors.py). The small convolutions run at
    full speed from about 8 channels on, so fewer are counted as 8. Multiplications in them take four times as long as
    in large ones. Several calls in place of one need `MINIMUM_MULTIPLICATIONS` to pay off. On a GPU, under autocast
    and inside `torch.compile` the usual backward pass is taken: there the rule has not been measured.
    """
    if isinstance(layer, nn.ConvTranspose2d) or not is_plain(layer):
        return False
    weight = layer.weight
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    d, k = weight_matrix_shape(layer)
    if x.dtype != weight.dtype or 4 * max(rank, 8) * (d + k) > d * k:
        return False
    if isinstance(layer, nn.Linear):
        return x.dim() >= 2 and x.numel() * d >= MINIMUM_MULTIPLICATIONS
    if layer.groups != 1 or x.dim() != weight.dim() or isinstance(layer.padding, str):
        return False
    pixels = x.numel() // (x.shape[1] * math.prod(layer.stride))
    return pixels * d * k >= MINIMUM_MULTIPLICATIONS


def run_with_factors(layer: nn.Module, up: Tensor, down: Tensor, x: Tensor) -> Tensor:
    """Returns the output of `layer` for `x` with the weight W0 + (up @ down).view_as(W0).

    It is differentiable in all of them.

    Args:
        layer: A plain layer for which `factors_save_time`.
        up: B (d, r), its scaling included, in the dtype of the weight.
        down: A (r, k).
        x: Input of the layer.
    """
    if isinstance(layer, nn.Linear):
        return _FactoredWeight.apply(x, layer.weight, up, down, layer.bias, None)
    padding = layer.padding
    if layer.padding_mode != "zeros":
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), (0,) * len(padding)
    return _FactoredWeight.apply(
        x, layer.weight, up, down, layer.bias, _Geometry(layer.stride, padding, layer.dilation)
    )


class _Geometry(NamedTuple):
    """Geometry of a convolution, with one entry for each spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.convolution(x, weight, bias, *self, False, (0,) * len(self.stride), 1)

    def backward(self, gradient: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> list[Tensor | None]:
        """Returns the gradients of x, weight and bias as far as `wanted`; only that of x reads the weight's values."""
        zeros = (0,) * len(self.stride)
        return _convolution_backward(gradient, x, weight, [weight.shape[0]], *self, False, zeros, 1, wanted)


class _FactoredWeight(torch.autograd.Function):
    """y = layer(x; weight + up @ down) for a linear layer (geometry None) or a convolution without groups."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, up: Tensor, down: Tensor, bias: Tensor | None, geometry: _Geometry | None
    ) -> Tensor:
        weight = weight + (up @ down).view(weight.shape)
        return F.linear(x, weight, bias) if geometry is None else geometry.forward(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *tensors, bias, ctx.geometry = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        """Derivative along `tangents` of x, weight, up, down and bias; None is zero."""
        x, weight, up, down = ctx.saved_tensors
        run = F.linear if ctx.geometry is None else ctx.geometry.forward
        x_tangent, weight_tangent, up_tangent, down_tangent, bias_tangent, _ = (
            torch.zeros_like(value) if tangent is None and value is not None else tangent
            for tangent, value in zip(tangents, (x, weight, up, down, None, None), strict=True)
        )
        delta_tangent = up_tangent @ down + up @ down_tangent
        along_weight = run(x, weight_tangent + delta_tangent.view(weight.shape), bias_tangent)
        return along_weight + run(x_tangent, weight + (up @ down).view(weight.shape))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, up, down = ctx.saved_tensors
        geometry, linear_shape = ctx.geometry, None
        if geometry is None:
            # As a 1 x 1 convolution over an image of one column: its gradients of thin matrices run in parallel.
            geometry, linear_shape = _Geometry((1, 1), (0, 0), (1, 1)), x.shape
            x, gradient = _as_image(x), _as_image(gradient)
            weight = weight[:, :, None, None]
        wants_x, wants_weight, wants_up, wants_down, wants_bias, _ = ctx.needs_input_grad
        wants_input_and_bias = [wants_x, wants_weight, wants_bias]
        if any(wants_input_and_bias):
            whole = weight + (up @ down).view(weight.shape)
            gradients = geometry.backward(gradient, x, whole, wants_input_and_bias)
            x_gradient, weight_gradient, bias_gradient = (
                value if wanted else None for value, wanted in zip(gradients, wants_input_and_bias, strict=True)
            )
        else:
            x_gradient = weight_gradient = bias_gradient = None
        up_gradient = down_gradient = None
        if wants_up or wants_down:
            up_gradient, down_gradient = _factor_gradients(geometry, gradient, x, up, down, weight.shape[1:])
        if linear_shape is not None:
            x_gradient = None if x_gradient is None else x_gradient[0, :, :, 0].T.reshape(linear_shape)
            weight_gradient = None if weight_gradient is None else weight_gradient[:, :, 0, 0]
        return x_gradient, weight_gradient, up_gradient, down_gradient, bias_gradient, None


def _as_image(x: Tensor) -> Tensor:
    """Returns (..., C) as (1, C, N, 1) in the memory format channels_last, without a copy of contiguous tensors."""
    return x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)


def _factor_gradients(
    geometry: _Geometry, gradient: Tensor, x: Tensor, up: Tensor, down: Tensor, kernel: torch.Size
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of `up` (d, r) and `down` (r, k); `kernel` is (in, *kernel size), k numbers."""
    ones, zeros = (1,) * len(geometry.stride), (0,) * len(geometry.stride)
    pointwise = kernel[1:] == ones and tuple(geometry.stride) == ones and tuple(geometry.padding) == zeros
    if pointwise and x.is_contiguous() and gradient.is_contiguous():
        # Matrix products beat the small convolutions in this memory format.
        x, gradient = x.flatten(2), gradient.flatten(2)
        narrow_gradient = torch.matmul(up.T, gradient)
        up_gradient = torch.matmul(gradient, torch.matmul(down, x).mT).sum(0)
        return up_gradient, torch.matmul(narrow_gradient, x.mT).sum(0)
    mix = _Geometry(ones, zeros, ones)
    filters, mixing = down.view(-1, *kernel), up.view(*up.shape, *ones)
    narrow = geometry.forward(x, filters)
    narrow_gradient, mixing_gradient, _ = mix.backward(gradient, narrow, mixing, [True, True, False])
    filters_gradient = geometry.backward(narrow_gradient, x, filters, [False, True, False])[1]
    return mixing_gradient.reshape(up.shape), filters_gradient.reshape(down.shape)
