"""Restormer (Zamir et al., CVPR 2022, arXiv 2111.09881)."""

from .configuration_restormer import RestormerConfig
from .modeling_restormer import RestormerForImageRestoration

__all__ = ["RestormerConfig", "RestormerForImageRestoration"]
