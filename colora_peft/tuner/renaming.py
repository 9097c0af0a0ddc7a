"""Another name for an adapter; PEFT itself can only save it and load it again."""

from peft import PeftModel
from peft.utils import ModulesToSaveWrapper

from colora_peft.utils import some, unwrapped

from .deltas import check_new_name, rename_key
from .layer import CoLoRALayer
from .model import tuner_of
from .offloading import check_nothing_offloaded
from .peft_internals import rename_own_copy


def rename_adapter(model: PeftModel, old: str, new: str) -> None:
    """Gives adapter `old` of `model` the name `new`; parameters, order and state (active, merged, trained) stay.

    Raises:
        TypeError: `model` is not a PeftModel with CoLoRA adapters, compiled or not.
        ValueError: There is no adapter `old`, `new` is taken, PyTorch cannot hold parameters under it, or the network
            is offloaded.
    """
    model = unwrapped(model)
    configs = tuner_of(model).peft_config
    check_nothing_offloaded(model, "rename_adapter")
    if old not in configs:
        raise ValueError(f"There is no adapter {old!r} to rename, only {some(sorted(configs))}.")
    check_new_name(new, configs)
    rename_key(configs, old, new)  # in place, because the tuner and the network share this dictionary
    for module in model.modules():
        if isinstance(module, CoLoRALayer):
            module.rename_adapter(old, new)
        elif isinstance(module, ModulesToSaveWrapper) and old in module.modules_to_save:
            rename_key(module.modules_to_save, old, new)
            rename_own_copy(module, old, new)
    for owner in (model, model.base_model):
        if owner.active_adapter == old:
            owner.active_adapter = new
        elif isinstance(owner.active_adapter, list):
            owner.active_adapter = [new if name == old else name for name in owner.active_adapter]
