"""The configuration of a CoLoRA adapter, saved as adapter_config.json beside its weights."""

import math
import os
import re
from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig

from colora_peft.ranks import ContributionScores, check_scores

from .peft_internals import SAVES_BIASES
from .registration import COLORA
from .scaling import METHOD_VERSION

BIAS_MODES = ("none", "all", "colora_only")
PRIOR_CONTRIBUTIONS = "colora_contributions"
"""Field of a network's configuration with contributions for any task: layer name to score >= 0."""


@dataclass
class CoLoRAConfig(PeftConfig):
    """Layers that get an adapter, and their ranks.

    The method is that of "Contribution-based Low-Rank Adaptation with Pre-training Model for Real Image Restoration"
    (Park, Kim, Chun; ECCV 2024; arXiv 2408.01099). The weight of layer i becomes W_i = W0_i + scaling * B_i A_i with a
    rank of its own. As everywhere in PEFT, A is the down factor (r x k) and B the up factor (d x r, zero at start).
    The paper's figure calls them the other way round.

    Ranks are given by `ranks`, or else allocated under `parameter_budget` by `contributions`. An allocation is written
    into `ranks`, so that loading needs this configuration alone. Where `contributions` are not given, those of the
    network count (`model.config.colora_contributions`). Where it has none, or `beta` is 0, every layer gets the same
    share as far as whole ranks allow. A thin layer (depthwise, first or last) gets rank 0 if one rank is more than
    that share.

    Args:
        target_modules: As in PEFT: full names or suffixes of them, a regular expression of full names, or
            "all-linear". None: every layer that can be adapted, or the layers in `ranks`.
        exclude_modules: Layers to leave alone, matched as `target_modules`.
        ranks: One rank for all layers, or the rank of each targeted layer by its full module name; 0 leaves a layer
            alone. Where factors of a rank cost as much as the weight, its delta is dense and the rank min(d, k).
        contributions: Score C_i >= 0 of each layer by its full module name, of any unit. Or the path of a file from
            `ContributionScores.save`, which is read at once, so that nothing depends on it later.
        parameter_budget: Trained share of the targeted weights, in (0, 1]. Used where `ranks` is not given.
        beta: Exponent >= 0 from contribution to share; 0 is uniform.
        delta_min: Share in [0, 1] that each layer may have before contributions count.
        min_rank_pattern: Lowest ranks of some layers, by full name, suffix or regular expression as in PEFT's
            `rank_pattern`: the first that matches counts. Where a layer has no rank that high it is dense. Used, as
            the next, where `ranks` is not given.
        max_rank_pattern: Highest ranks of some layers; a dense delta counts as rank min(d, k). The budget that they
            leave goes to the other layers.
        colora_alpha: Gain of the delta; see `colora_peft.tuner.scaling.adapter_scaling`.
        bias: Biases to train: "none", "all", or "colora_only", those of the adapted layers.
        modules_to_save: Modules besides the adapter that are trained whole and saved with it.
        layers_to_transform: Indices of the blocks to adapt, for layers inside an nn.ModuleList or nn.Sequential.
        layers_pattern: Name of that list; PEFT needs it where the list is a direct child of the network.
        init_weights: False draws B at random, so that a new adapter is not the identity: for tests.
        method_version: Version of the file format, written by the package. An adapter keeps the one it was made with.
        base_fingerprint: Fingerprint of the weights that the adapter belongs to, written by the package; see
            `colora_peft.tuner.fingerprint.base_fingerprint`. None: not known.

    Raises:
        ValueError: A field is out of its range, or two fields contradict each other.
    """

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    ranks: int | dict[str, int] | None = None
    contributions: dict[str, float] | str | os.PathLike[str] | None = None
    parameter_budget: float = 0.07
    beta: float = 0.5
    delta_min: float = 0.0
    min_rank_pattern: dict[str, int] = field(default_factory=dict)
    max_rank_pattern: dict[str, int] = field(default_factory=dict)
    colora_alpha: float = 16.0
    bias: str = "none"
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    init_weights: bool = True
    method_version: int | None = None
    base_fingerprint: str | None = None
    # PEFT's matching looks for this field; single parameters cannot be targeted.
    target_parameters: None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_method_version(from_file=self.peft_type is not None)  # only files say so before the next line does
        self.peft_type = COLORA
        # PEFT compares names with sets, and writes sets as lists.
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if isinstance(self.contributions, str | os.PathLike):
            self.contributions = ContributionScores.load(self.contributions).scores
        self._check_numbers()
        self._check_rank_patterns()
        self._check_ranks_and_contributions()
        self._check_layer_selection()

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields, sets as sorted lists, so that equal configurations give equal files."""
        fields = {name: value for name, value in super().to_dict().items() if name != "target_parameters"}
        return {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}

    def _check_method_version(self, from_file: bool) -> None:
        if self.method_version is None:  # the first versions wrote none
            self.method_version = 1 if from_file else METHOD_VERSION
        if not isinstance(self.method_version, int) or self.method_version < 1:
            raise ValueError(
                f"The adapter's method_version is {self.method_version!r}, not a whole number >= 1: "
                "adapter_config.json is damaged, take it from where the adapter came from."
            )
        if self.method_version > METHOD_VERSION:
            raise ValueError(
                f"The adapter was saved by a newer colora_peft (method_version {self.method_version}, this one "
                f"reads {METHOD_VERSION}): update colora_peft, in a clone with `git pull`."
            )

    def _check_numbers(self) -> None:
        for name, is_in_range, remedy in (  # NaN is in no range
            ("parameter_budget", 0 < self.parameter_budget <= 1, "the trained share of the weights, in (0, 1]"),
            ("beta", 0 <= self.beta < math.inf, "an exponent >= 0; 0 is uniform, 1 proportional to contribution"),
            ("delta_min", 0 <= self.delta_min <= 1, "a share of each layer's weights, in [0, 1]"),
            ("colora_alpha", 0 < self.colora_alpha < math.inf, "a finite gain > 0, for example 16.0"),
        ):
            if not is_in_range:
                raise ValueError(f"The setting {name} is {getattr(self, name)}: choose {remedy}.")

    def _check_ranks_and_contributions(self) -> None:
        if self.ranks is not None:
            named_ranks = self.ranks if isinstance(self.ranks, dict) else {"every layer": self.ranks}
            for name, rank in named_ranks.items():
                _check_rank(rank, repr(name))
        if self.contributions is not None:
            check_scores(self.contributions, "pass those of ContributionScores.scores, or the path of their file")
            self.contributions = {layer: float(score) for layer, score in self.contributions.items()}

    def _check_rank_patterns(self) -> None:
        for what in ("min_rank_pattern", "max_rank_pattern"):
            patterns = getattr(self, what)
            if not isinstance(patterns, dict):
                raise ValueError(f"The {what} is {patterns!r}: pass a dict of layer name or pattern to rank.")
            if patterns and isinstance(self.ranks, int):
                raise ValueError(
                    f"The {what} has no effect with ranks={self.ranks}, which gives every layer that rank: leave one "
                    "of them out."
                )
            for pattern, rank in patterns.items():
                _check_rank(rank, f"{pattern!r} in {what}")
                try:
                    re.compile(pattern)
                except (re.error, TypeError) as error:
                    raise ValueError(
                        f"The {pattern!r} in {what} is not a regular expression ({error}): correct it, or pass a name."
                    ) from error

    def _check_layer_selection(self) -> None:
        if self.bias not in BIAS_MODES:
            raise ValueError(f"The setting bias is {self.bias!r}: choose one of {', '.join(BIAS_MODES)}.")
        if self.bias != "none" and not SAVES_BIASES:
            raise ValueError(
                f"The setting bias is {self.bias!r} but this PEFT does not save trained biases: "
                "run `pip install 'peft>=0.21'`."
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "The indices layers_to_transform have no effect on a regular expression in target_modules: "
                "write the indices into the expression, or pass a list of names."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "The name layers_pattern needs layers_to_transform: pass the indices of the blocks to adapt."
            )


def _check_rank(rank: Any, whose: str) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
        raise ValueError(f"The rank of {whose} is {rank!r}: ranks are whole numbers >= 0.")
