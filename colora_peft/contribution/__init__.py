"""Measures how much each layer contributes to a new task.

`estimate_contributions` is the entry. Its estimators take one pass of gradients at the pre-trained weights
(`one_pass`) or integrate along a path in weight space (`faig`). The network is afterwards as it was.
"""

from .estimate import ESTIMATORS, Estimator, FaigSettings, ProbeSettings, estimate_contributions
from .one_pass import OnePassEstimator

__all__ = [
    "ESTIMATORS",
    "Estimator",
    "FaigSettings",
    "OnePassEstimator",
    "ProbeSettings",
    "estimate_contributions",
]
