"""The private names of PEFT that this package uses without overriding them, for PEFT 0.18 to 0.21.

Look here first on a new release of PEFT. Private methods that are overridden are in deltas.py, layer.py and model.py.
"""

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

SAVES_BIASES = hasattr(BaseTuner, "_get_learnable_bias_state_dict")
"""Whether PEFT saves trained biases with adapters of methods that are not its own; it does since 0.21."""

ANNOUNCES_LOADING = hasattr(BaseTuner, "_remap_adapter_state_dict_for_load")
"""Whether PEFT asks a method before it loads the weights of an adapter; it does since 0.21."""


def replace_layer(tuner: BaseTuner, parent: nn.Module, name: str, new: nn.Module, old: nn.Module) -> None:
    """Puts `new` in the place of `old`, the child `name` of `parent`, and on its device."""
    tuner._replace_module(parent, name, new, old)


def move_to_base_device(layer: BaseTunerLayer, adapter_name: str) -> None:
    """Moves an adapter to the device of the layer that it adapts."""
    layer._move_adapter_to_device_of_base_layer(adapter_name)


def adapters_with_own_copy(wrapper: AuxiliaryTrainingWrapper) -> set[str]:
    """Returns the adapters that have a copy of the wrapped module; the set is PEFT's own."""
    return wrapper._adapters


def rename_own_copy(wrapper: ModulesToSaveWrapper, old: str, new: str) -> None:
    """Calls adapter `old` `new` wherever a wrapper of modules_to_save keeps its name beside the copies."""
    wrapper._adapters.discard(old)
    wrapper._adapters.add(new)
    if wrapper._active_adapter == old:
        wrapper._active_adapter = new
    elif isinstance(wrapper._active_adapter, list):
        wrapper._active_adapter = [new if name == old else name for name in wrapper._active_adapter]
