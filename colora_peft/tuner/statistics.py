"""Running statistics of the base, such as those of BatchNorm, which stay as they are while adapters are trained.

An adapter is saved without the buffers of its base. Statistics that moved with it would be lost, and would change what
the base and every other adapter on it compute. So the layers that hold them run as in evaluation mode.
"""

from typing import Any

from torch import Tensor, nn


def freeze_statistics(model: nn.Module) -> None:
    """Keeps all running statistics in `model` as they are, except where the parameters beside them are trained.

    A hook on each layer does it: PEFT and transformers put training mode on in ways that no adapter hears of.
    """
    for module in model.modules():
        if _has_statistics(module) and _run_as_in_evaluation not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_run_as_in_evaluation)


def release_statistics(model: nn.Module) -> None:
    """Undoes `freeze_statistics`."""
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _run_as_in_evaluation]:
            del hooks[key]


def leave_training_mode(model: nn.Module) -> None:
    """Puts the layers with frozen statistics into evaluation mode, before their first call does."""
    for module in model.modules():
        if _run_as_in_evaluation in module._forward_pre_hooks.values():
            _run_as_in_evaluation(module)


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module._buffers.get("running_mean"), Tensor)


def _run_as_in_evaluation(module: nn.Module, *_: Any) -> None:
    """Hook before the forward pass of a layer with running statistics.

    Its scale is trained with modules_to_save, or where somebody trains the base itself: then the statistics move too.
    """
    scale = module._parameters.get("weight")
    if module.training and (scale is None or not scale.requires_grad):
        module.training = False
