"""The layers of a network that CoLoRA can adapt, and the weight of a layer as a matrix."""

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .matrix_shape import MatrixShape

ADAPTABLE_KINDS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
SUPPORTED_LAYERS = ", ".join(kind.__name__ for kind in ADAPTABLE_KINDS)
_CLOSED = AuxiliaryTrainingWrapper | nn.MultiheadAttention | nn.TransformerEncoderLayer


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
    closed: str | None = None  # prefix of the last module whose inside is not ours; children follow their parent
    for name, module in model.named_modules():
        if closed is not None and name.startswith(closed):
            continue
        if isinstance(module, BaseTunerLayer | _CLOSED):
            closed = f"{name}." if name else ""
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        if why_not_adaptable(module) is None:
            layers[name] = module
    return layers


def why_not_adaptable(layer: nn.Module) -> str | None:
    """Returns None for a layer that CoLoRA can adapt, else the reason as the end of a sentence."""
    if not isinstance(layer, ADAPTABLE_KINDS):
        return f"CoLoRA adapts {SUPPORTED_LAYERS}"
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight without calling it"
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its weight is computed (weight_norm, spectral_norm, ...): remove the parametrization first"
    if nn.parameter.is_lazy(weight):
        return "its shape is not known yet: run the model once first"
    if not weight.is_floating_point():
        return f"its weight is quantized to {weight.dtype}"
    return None
