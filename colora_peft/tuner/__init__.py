"""The PEFT method itself.

`CoLoRAConfig` says which layers are adapted, `CoLoRAModel` is the tuner that PEFT calls, and `CoLoRALayer` is the
adapted layer. Adapters can be renamed, blended, swapped in a compiled network, and exported to stock LoRA. `import
colora_peft` registers the method with PEFT.
"""

from .config import PRIOR_CONTRIBUTIONS, CoLoRAConfig
from .fingerprint import base_fingerprint, is_other_base
from .functional import factors_save_time, run_with_factors, run_with_weight
from .hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from .layer import CoLoRALayer, carried_adapters
from .lora_export import lora_obstacle, save_as_lora
from .model import CoLoRAModel
from .registration import register_colora
from .renaming import rename_adapter
from .scaling import METHOD_VERSION, adapter_scaling
from .targets import check_not_compiled, resolve_ranks

__all__ = [
    "CoLoRAConfig",
    "CoLoRALayer",
    "CoLoRAModel",
    "METHOD_VERSION",
    "PRIOR_CONTRIBUTIONS",
    "adapter_scaling",
    "base_fingerprint",
    "carried_adapters",
    "check_not_compiled",
    "factors_save_time",
    "hotswap_adapter",
    "is_other_base",
    "lora_obstacle",
    "prepare_model_for_compiled_hotswap",
    "register_colora",
    "rename_adapter",
    "resolve_ranks",
    "run_with_factors",
    "run_with_weight",
    "save_as_lora",
]
