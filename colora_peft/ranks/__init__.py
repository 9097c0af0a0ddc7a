"""Allocate: layers, scores and a budget become ranks.

Pure functions from the shapes of layers, their contribution scores and a budget of trained parameters to one rank for
each layer. `allocate_ranks` is the entry; tables and figures of an allocation are here, too.
"""

from .adaptable import SUPPORTED_LAYERS, adaptable_layers, weight_matrix_shape, why_not_adaptable
from .allocation import (
    adapter_parameters,
    allocate_ranks,
    check_same_names,
    common_rank,
    is_dense,
    names_hint,
    stored_rank,
    unknown_layer_message,
)
from .figure import check_figures_can_be_drawn, plot_contributions
from .report import format_allocation_table
from .scores import ContributionScores, check_scores, mean_scores

__all__ = [
    "ContributionScores",
    "SUPPORTED_LAYERS",
    "adaptable_layers",
    "adapter_parameters",
    "allocate_ranks",
    "check_figures_can_be_drawn",
    "check_same_names",
    "check_scores",
    "common_rank",
    "format_allocation_table",
    "is_dense",
    "mean_scores",
    "names_hint",
    "plot_contributions",
    "stored_rank",
    "unknown_layer_message",
    "weight_matrix_shape",
    "why_not_adaptable",
]
