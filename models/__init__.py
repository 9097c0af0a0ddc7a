"""Restoration backbones as Hugging Face models. Importing this registers them with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageToImage

from .nafnet import NAFNetConfig, NAFNetForImageRestoration
from .restormer import RestormerConfig, RestormerForImageRestoration

# exist_ok: importing the package twice (reload, notebook) must not fail.
for _config, _model in (
    (NAFNetConfig, NAFNetForImageRestoration),
    (RestormerConfig, RestormerForImageRestoration),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForImageToImage.register(_config, _model, exist_ok=True)

__all__ = [
    "NAFNetConfig",
    "NAFNetForImageRestoration",
    "RestormerConfig",
    "RestormerForImageRestoration",
]
