"""The result of a contribution estimate: one score per layer, how it was made, and its JSON file."""

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from numbers import Real
from pathlib import Path
from typing import Any

from colora_peft.utils import some, write_text


@dataclass(frozen=True)
class ContributionScores:
    """Scores of the adaptable layers for one task, with the record of how they were measured.

    A score sums over a layer's filters. Filter j is weight[j], the part at j along the weight's first axis: an output
    channel or feature, but an input channel of a transposed convolution.

    Attributes:
        scores: Score by layer name (>= 0, a mean per weight), in network order; 0 for a layer that did not move or
            that the loss never reaches.
        method: The estimator: "faig" (end weights were given), "probe" (end weights from a short full tuning),
            "gradient", "fisher" or "taylor" (one pass at the start weights).
        num_batches: Number of batches that the loss is a mean over, those of all processes.
        loss_start: Mean loss at the start weights.
        loss_end: Mean loss at the end weights; None without a path, as the next two.
        path_integral: Signed attribution summed over all parameters, also biases and norms, which get no score.
        num_path_steps: Number of midpoints on the path.
        num_tuning_steps: Number of steps of the probe's tuning; None without one, as its learning rate.
        tuning_learning_rate: Learning rate of the probe's tuning.
        unreached: Layers without a gradient in any batch (score 0): unused, or cut off from the loss.
        num_processes: Number of processes that shared the batches.
        seconds: Wall time of the whole estimate, the probe's tuning included.
        source: Network, data and settings that were measured, in the user's words; nothing is computed from it.

    Raises:
        ValueError: A score is negative, NaN or infinite (named).
    """

    scores: dict[str, float]
    method: str
    num_batches: int
    loss_start: float
    loss_end: float | None = None
    path_integral: float | None = None
    num_path_steps: int | None = None
    num_tuning_steps: int | None = None
    tuning_learning_rate: float | None = None
    unreached: tuple[str, ...] = ()
    num_processes: int = 1
    seconds: float = 0.0
    source: dict[str, str | int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_scores(self.scores, "measure again")
        object.__setattr__(self, "scores", {layer: float(score) for layer, score in self.scores.items()})
        object.__setattr__(self, "unreached", tuple(self.unreached))  # JSON has lists

    @property
    def completeness_error(self) -> float | None:
        """|path_integral - loss change| / |loss change|: 0 when the path was walked finely enough; None without one.

        It is infinite if the loss did not change while the integral is not 0: then the ratio says nothing.
        """
        if self.path_integral is None or self.loss_end is None:
            return None
        change = self.loss_end - self.loss_start
        miss = abs(self.path_integral - change)
        if change == 0.0:
            return 0.0 if miss == 0.0 else math.inf
        return miss / abs(change)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON to `path`, replacing it in one step, so that no reader meets half a file.

        Raises:
            ValueError: The folder does not exist.
        """
        path = Path(path)
        if not path.parent.is_dir():
            raise ValueError(
                f"Cannot save contribution scores to '{path}': make the folder '{path.parent}', which does not exist."
            )
        error = self.completeness_error
        # For the human reader of the file only: `load` computes it again. JSON has no infinity.
        content = {**asdict(self), "completeness_error": None if error == math.inf else error}
        write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ContributionScores":
        """Reads what `save` wrote, also in another version: entries that its file did not have take their defaults.

        Raises:
            ValueError: The file does not exist, holds no JSON, lacks an entry that has no default, has one of another
                type, or a score that is negative, NaN or infinite (named).

        Warns:
            UserWarning: The file holds entries that this version does not know (named); they are ignored.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"Cannot read contribution scores from '{path}' ({error.strerror}).") from error
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
            raise ValueError(
                f"The file '{path}' holds no valid JSON ({error}): write it with ContributionScores.save."
            ) from error
        known = {entry.name for entry in fields(cls)}
        try:
            _check_entries(content)
            scores = cls(**{name: content[name] for name in content if name in known})
        except ValueError as error:
            raise ValueError(f"The file '{path}' holds no usable contribution scores. {error}") from error
        unknown = content.keys() - known - {"completeness_error"}
        if unknown:
            warnings.warn(
                f"The file '{path}' holds entries that this version of colora_peft does not know, which are ignored: "
                f"{some([repr(name) for name in sorted(unknown)], 5)}.",
                stacklevel=2,
            )
        return scores


def _check_entries(content: Any) -> None:
    """Checks what a file holds, but for the scores themselves.

    Raises:
        ValueError: It is no table, lacks an entry that has no default, or has one of another type (named).
    """
    remedy = "measure again with contribution.py"
    if not isinstance(content, Mapping):
        raise ValueError(f"It is no table of entries: {remedy}.")
    missing = [one.name for one in fields(ContributionScores)
               if one.default is MISSING and one.default_factory is MISSING and one.name not in content]  # fmt: skip
    if missing:
        raise ValueError(f"It lacks {some(missing)}: {remedy}.")
    for name in ("num_batches", "loss_start", "loss_end", "path_integral"):
        value, may_be_none = content.get(name), name in ("loss_end", "path_integral")
        if not (value is None and may_be_none) and (isinstance(value, bool) or not isinstance(value, Real)):
            raise ValueError(f"Its {name} is {value!r:.80}, no number: {remedy}.")
    unreached = content.get("unreached", [])
    if not isinstance(unreached, list) or not all(isinstance(layer, str) for layer in unreached):
        raise ValueError(f"Its unreached is {unreached!r:.80}, no list of layer names: {remedy}.")


def mean_scores(measured: Sequence[ContributionScores]) -> dict[str, float]:
    """Returns the mean of measurements of the same layers, each divided by its sum so that units do not count.

    Raises:
        ValueError: There is no measurement, one names other layers than the first, or its scores are all 0.
    """
    if not measured:
        raise ValueError("There are no contributions to take the mean of: pass at least one measurement.")
    totals = [sum(own.scores.values()) for own in measured]
    for own, total in zip(measured, totals, strict=True):
        if own.scores.keys() != measured[0].scores.keys():
            raise ValueError(
                f"The contributions are of different networks: {own.source or own.method} has other layers than "
                f"{measured[0].source or measured[0].method}. Measure them on the same one."
            )
        if total == 0:
            raise ValueError(f"The contributions {own.source or own.method} are all 0: measure again.")
    return {
        layer: sum(own.scores[layer] / total for own, total in zip(measured, totals, strict=True)) / len(measured)
        for layer in measured[0].scores
    }


def check_scores(scores: Any, remedy: str) -> None:
    """Checks that `scores` is a table of layer name to finite number >= 0.

    Raises:
        ValueError: It is not; names the layer.
    """
    if not isinstance(scores, Mapping) or not scores:
        raise ValueError(f"The contributions are {scores!r:.80}, no table of layer name to score: {remedy}.")
    for layer, score in scores.items():
        # Real: also NumPy's numbers.
        is_number = isinstance(score, Real) and not isinstance(score, bool)
        if not is_number or not 0 <= score < math.inf:
            raise ValueError(
                f"The contribution of layer {layer!r} is {score!r}: scores must be finite and >= 0; {remedy}."
            )
