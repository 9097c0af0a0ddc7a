"""The trust boundary: adapters and networks come from folders and the Hub, and go there.

`load` turns a name into a network that restores; only JSON and safetensors are read, and never code. `push_folder`
shares a result, and `cards` writes its model card.
"""

from .asking import BY_FLAG, BY_OTHER_FLAG, Asking
from .cards import (
    AdaptedNetwork,
    RunFacts,
    TuningMetrics,
    adapted_card,
    backbone_card,
    best_step,
    hardware_name,
    loading_code,
)
from .loading import load, load_base, load_for_script, load_for_training, peft_type_of
from .networks import is_function, load_backbone, register_backbones
from .pushing import create_hub_repo, push_folder
from .source import ADAPTER_FILES, Source, fetch

__all__ = [
    "ADAPTER_FILES",
    "AdaptedNetwork",
    "Asking",
    "BY_FLAG",
    "BY_OTHER_FLAG",
    "RunFacts",
    "Source",
    "TuningMetrics",
    "adapted_card",
    "backbone_card",
    "best_step",
    "create_hub_repo",
    "fetch",
    "hardware_name",
    "is_function",
    "load",
    "load_backbone",
    "load_base",
    "load_for_script",
    "load_for_training",
    "loading_code",
    "peft_type_of",
    "push_folder",
    "register_backbones",
]
