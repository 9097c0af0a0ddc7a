"""Restoration backbones as Hugging Face models.

Importing this registers NAFNet and Restormer with transformers' Auto classes. `RestorationBackbone` is the base class
for a backbone of your own. README.md in this folder states the contract that every backbone keeps.
"""

from .backbone import RestorationBackbone, register
from .image_processing_restoration import RestorationImageProcessor
from .nafnet import NAFNetConfig, NAFNetForImageRestoration
from .restormer import RestormerConfig, RestormerForImageRestoration

__all__ = [
    "NAFNetConfig",
    "NAFNetForImageRestoration",
    "RestorationBackbone",
    "RestorationImageProcessor",
    "RestormerConfig",
    "RestormerForImageRestoration",
    "register",
]

register(NAFNetForImageRestoration)
register(RestormerForImageRestoration)
