"""The layers of a network that CoLoRA can adapt, those that it leaves out, and the weight of a layer as a matrix."""

from collections import defaultdict
from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from colora_peft.utils import some

from .matrix_shape import MatrixShape

ADAPTABLE_KINDS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
SUPPORTED_LAYERS = ", ".join(kind.__name__ for kind in ADAPTABLE_KINDS)
_READ_INSIDE = nn.MultiheadAttention | nn.TransformerEncoderLayer
_CLOSED = AuxiliaryTrainingWrapper | _READ_INSIDE


def weight_matrix_shape(layer: nn.Module) -> MatrixShape:
    """Returns (d, k) of a layer's weight: its first dimension and the product of the others, for any kind of layer."""
    weight = layer.weight
    return MatrixShape(weight.shape[0], weight.numel() // weight.shape[0])


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the layers that CoLoRA can adapt by full module name, in network order.

    A layer that is already adapted appears as its base layer under its own name. Left out are layers that other
    modules run without calling them: inside nn.MultiheadAttention and nn.TransformerEncoderLayer, which read the
    weights directly. Left out is also what PEFT trains whole (`modules_to_save`).
    """
    layers = {}
    for name, module in _reached_modules(model):
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        if why_not_adaptable(module) is None:
            layers[name] = module
    return layers


def _reached_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields modules with their full names, in network order, but none from inside of those that are closed to us."""
    closed: str | None = None  # prefix of the last closed module; children follow their parent
    for name, module in model.named_modules():
        if closed is not None and name.startswith(closed):
            continue
        if isinstance(module, BaseTunerLayer | _CLOSED):
            closed = f"{name}." if name else ""
        yield name, module


def why_not_adaptable(layer: nn.Module) -> str | None:
    """Returns None for a layer that CoLoRA can adapt, else the reason as the end of a sentence."""
    if not isinstance(layer, ADAPTABLE_KINDS):
        return f"CoLoRA adapts {SUPPORTED_LAYERS}"
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight without calling it"
    weight = layer._parameters.get("weight")
    if weight is None:
        norm, remedy = _computed_by(layer)
        return f"its weight is computed by {norm}: call {remedy} first"
    if nn.parameter.is_lazy(weight):
        return "its shape is not known yet: run the model once first"
    if not weight.is_floating_point():
        return f"its weight is quantized to {weight.dtype}"
    return None


def left_out(model: nn.Module) -> list[str]:
    """Returns a line for each kind of layer with weights of an adaptable shape that `adaptable_layers` leaves out."""
    read_inside, computed = defaultdict(list), defaultdict(list)
    for name, module in _reached_modules(model):
        if isinstance(module, _READ_INSIDE):
            kind = nn.MultiheadAttention if isinstance(module, nn.MultiheadAttention) else nn.TransformerEncoderLayer
            read_inside[kind.__name__].append(name)
        elif isinstance(module, ADAPTABLE_KINDS) and module._parameters.get("weight") is None:
            computed[_computed_by(module)].append(name)
    lines = [
        f"Left out: {len(names)} nn.{kind} (their weights are read without a call): {some(names, 5)}"
        for kind, names in read_inside.items()
    ]
    return lines + [
        f"Left out: {len(names)} whose weight {norm} computes (adaptable after {remedy}): {some(names, 5)}"
        for (norm, remedy), names in computed.items()
    ]


def no_adaptable_layer(model: nn.Module) -> str:
    """Returns why none of the layers of a network can be adapted, and the remedy, as one or two sentences."""
    begin = f"{type(model).__name__} has no layer that can be adapted"
    lines = left_out(model)
    if not lines:
        return f"{begin}: CoLoRA adapts {SUPPORTED_LAYERS}."
    return f"{begin}. {'; '.join(lines)}."


def _computed_by(layer: nn.Module) -> tuple[str, str]:
    """Returns what computes the weight of `layer`, and the call that makes it a parameter of the same value."""
    if nn.utils.parametrize.is_parametrized(layer, "weight"):
        names = [type(step).__name__ for step in layer.parametrizations["weight"]]
        norm = " and ".join(_NORMS.get(name, name) for name in names)
        return norm, "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
    if "weight_g" in layer._parameters:
        return "weight_norm", "torch.nn.utils.remove_weight_norm(layer)"
    if "weight_mask" in layer._buffers:
        return "pruning", "torch.nn.utils.prune.remove(layer, 'weight')"
    if "weight_orig" in layer._parameters:
        return "spectral_norm", "torch.nn.utils.remove_spectral_norm(layer)"
    return "the module", "what makes it a parameter"


_NORMS = {"_WeightNorm": "weight_norm", "_SpectralNorm": "spectral_norm", "_Orthogonal": "orthogonal"}
"""PyTorch's parametrizations by the names of their classes."""
