"""NAFNet (Chen et al., ECCV 2022, arXiv 2204.04676)."""

from .configuration_nafnet import NAFNetConfig
from .modeling_nafnet import NAFNetForImageRestoration

__all__ = ["NAFNetConfig", "NAFNetForImageRestoration"]
