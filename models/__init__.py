"""Restoration backbones as Hugging Face models. Importing this registers them with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageToImage

from .nafnet import NAFNetConfig, NAFNetForImageRestoration

# exist_ok: importing the package twice (reload, notebook) must not fail.
AutoConfig.register("nafnet", NAFNetConfig, exist_ok=True)
AutoModel.register(NAFNetConfig, NAFNetForImageRestoration, exist_ok=True)
AutoModelForImageToImage.register(NAFNetConfig, NAFNetForImageRestoration, exist_ok=True)

__all__ = ["NAFNetConfig", "NAFNetForImageRestoration"]
