"""Measure: how much each layer contributes to a new task.

`estimate_contributions` is the entry. The estimators are one pass of gradients at the pre-trained weights (`one_pass`)
and integrals along a path in weight space (`faig`). The network is put back as it was afterwards.
"""

from .estimate import ESTIMATORS, ContributionScores, Estimator, FaigSettings, ProbeSettings, estimate_contributions

__all__ = ["ContributionScores", "ESTIMATORS", "Estimator", "FaigSettings", "ProbeSettings", "estimate_contributions"]
