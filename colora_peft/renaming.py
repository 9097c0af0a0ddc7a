"""Another name for an adapter; PEFT itself can only save it and load it again."""

from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn

from .delta_store import check_adapter_name
from .layer import CoLoRALayer
from .messages import some

__all__ = ["rename_adapter"]


def rename_adapter(model: PeftModel, old: str, new: str) -> None:
    """Give adapter `old` of `model` the name `new`: parameters, order and state (active, merged, trained) stay.

    Raises:
        ValueError: There is no adapter `old`, `new` is taken, or PyTorch cannot hold parameters under it.
    """
    configs = model.peft_config
    if old not in configs:
        raise ValueError(f"There is no adapter {old!r} to rename, only {some(sorted(configs))}.")
    if new in configs:
        raise ValueError(f"There is already an adapter {new!r}: delete it first, or choose another name.")
    check_adapter_name(new)
    # In place, because the tuner and the network share this dictionary.
    renamed = {new if name == old else name: config for name, config in configs.items()}
    configs.clear()
    configs.update(renamed)
    for module in model.modules():
        if isinstance(module, CoLoRALayer):
            module.rename_adapter(old, new)
        elif isinstance(module, ModulesToSaveWrapper) and old in module.modules_to_save:
            _rename_in_wrapper(module, old, new)
    for owner in (model, model.base_model):
        if owner.active_adapter == old:
            owner.active_adapter = new
        elif isinstance(owner.active_adapter, list):
            owner.active_adapter = [new if name == old else name for name in owner.active_adapter]


def _rename_in_wrapper(wrapper: ModulesToSaveWrapper, old: str, new: str) -> None:
    modules: nn.ModuleDict = wrapper.modules_to_save
    modules[new] = modules.pop(old)
    wrapper._adapters.discard(old)
    wrapper._adapters.add(new)
    if wrapper._active_adapter == old:
        wrapper._active_adapter = new
    elif isinstance(wrapper._active_adapter, list):
        wrapper._active_adapter = [new if name == old else name for name in wrapper._active_adapter]
