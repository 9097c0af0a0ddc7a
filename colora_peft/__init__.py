"""CoLoRA for PEFT: contribution-based low-rank adaptation of image restoration networks.

Importing this package makes the method known to PEFT: `peft.get_peft_model(model, CoLoRAConfig(...))` and
`peft.PeftModel.from_pretrained(model, path)` work from then on.
"""

from importlib.metadata import version

from .adaptable import adaptable_layers, weight_matrix_shape
from .allocation import adapter_parameters, allocate_ranks
from .config import CoLoRAConfig
from .contribution import ContributionScores, ProbeSettings, faig, probe
from .layer import CoLoRALayer
from .model import CoLoRAModel
from .registration import register_colora

__version__ = version("colora-peft")

__all__ = [
    "CoLoRAConfig",
    "CoLoRALayer",
    "CoLoRAModel",
    "ContributionScores",
    "ProbeSettings",
    "adaptable_layers",
    "adapter_parameters",
    "allocate_ranks",
    "faig",
    "probe",
    "weight_matrix_shape",
]

register_colora(CoLoRAConfig, CoLoRAModel)
