"""Allocation of ranks: from layers, scores and a budget.

`allocate_ranks` is the entry: a pure function from the shapes of layers, their contribution scores and a budget of
trained parameters to one rank for each layer. `adaptable_layers` finds the layers, `ContributionScores` holds their
scores, and an allocation can be printed as a table and drawn as a figure.
"""

from .adaptable import (
    ADAPTABLE_KINDS,
    SUPPORTED_LAYERS,
    adaptable_layers,
    left_out,
    no_adaptable_layer,
    weight_matrix_shape,
    why_not_adaptable,
)
from .allocation import adapter_parameters, allocate_ranks, check_pays_for_a_rank, common_rank
from .figure import check_figures_can_be_drawn, plot_contributions
from .matrix_shape import MatrixShape
from .names import check_known_names, check_same_names, names_hint
from .scores import ContributionScores, check_scores, mean_scores
from .table import format_allocation_table

__all__ = [
    "ADAPTABLE_KINDS",
    "ContributionScores",
    "MatrixShape",
    "SUPPORTED_LAYERS",
    "adaptable_layers",
    "adapter_parameters",
    "allocate_ranks",
    "check_figures_can_be_drawn",
    "check_known_names",
    "check_pays_for_a_rank",
    "check_same_names",
    "check_scores",
    "common_rank",
    "format_allocation_table",
    "left_out",
    "mean_scores",
    "names_hint",
    "no_adaptable_layer",
    "plot_contributions",
    "weight_matrix_shape",
    "why_not_adaptable",
]
