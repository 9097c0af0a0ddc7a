"""CoLoRA for PEFT: contribution-based low-rank adaptation of image restoration networks.

Importing this package makes the method known to PEFT: `peft.get_peft_model(model, CoLoRAConfig(...))` and
`peft.PeftModel.from_pretrained(model, path)` work from then on.
"""

from importlib.metadata import version

from colora_peft.contribution import ESTIMATORS, FaigSettings, ProbeSettings, estimate_contributions
from colora_peft.hub import load, load_backbone
from colora_peft.inference import local_pooling, restoration_loss, restore_image
from colora_peft.ranks import (
    ContributionScores,
    adaptable_layers,
    adapter_parameters,
    allocate_ranks,
    weight_matrix_shape,
)
from colora_peft.tuner import (
    CoLoRAConfig,
    CoLoRALayer,
    CoLoRAModel,
    base_fingerprint,
    hotswap_adapter,
    prepare_model_for_compiled_hotswap,
    register_colora,
    rename_adapter,
    save_as_lora,
)

__version__ = version("colora-peft")

__all__ = [
    "ESTIMATORS",
    "CoLoRAConfig",
    "CoLoRALayer",
    "CoLoRAModel",
    "ContributionScores",
    "FaigSettings",
    "ProbeSettings",
    "adaptable_layers",
    "adapter_parameters",
    "allocate_ranks",
    "base_fingerprint",
    "estimate_contributions",
    "hotswap_adapter",
    "load",
    "load_backbone",
    "local_pooling",
    "prepare_model_for_compiled_hotswap",
    "rename_adapter",
    "restoration_loss",
    "restore_image",
    "save_as_lora",
    "weight_matrix_shape",
]

register_colora(CoLoRAConfig, CoLoRAModel)
