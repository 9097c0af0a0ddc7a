"""The result of a contribution estimate: one score per layer, how it was made, and its JSON file."""

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from numbers import Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args

from colora_peft.utils import some, write_text

__all__ = ["ContributionScores", "check_scores", "mean_scores"]


@dataclass(frozen=True)
class ContributionScores:
    """Scores of the adaptable layers for one task, with the record of how they were measured.

    A score sums over a layer's filters, filter j being weight[j]: what lies at j along the weight's first axis. That
    is an output channel or feature, but an input channel of a transposed convolution.

    Attributes:
        scores: layer name -> score (>= 0, a mean per weight), in network order; 0 for a layer that did not move or
            that the loss never reaches.
        method: the estimator: "faig" (end weights were given), "probe" (end weights from a short full tuning),
            "gradient", "fisher" or "taylor" (one pass at the start weights).
        num_batches: batches that the loss is a mean over, those of all processes.
        loss_start: mean loss at the start weights.
        loss_end: mean loss at the end weights; None without a path, as the next two.
        path_integral: signed attribution summed over all parameters, also biases and norms that get no score of their
            own.
        num_path_steps: midpoints on the path.
        num_tuning_steps: steps of the probe's tuning; None without one, as its learning rate.
        tuning_learning_rate: learning rate of the probe's tuning.
        unreached: layers without a gradient in any batch (score 0): unused, or cut off from the loss.
        num_processes: processes that shared the batches.
        seconds: wall time of the whole estimate, the probe's tuning included.
        source: which network, data and settings the scores are of, in the words of whoever had them measured; a record
            that nothing is computed from.

    Raises:
        ValueError: a score is negative, NaN or infinite (named).
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

    @property
    def completeness_error(self) -> float | None:
        """|path_integral - loss change| / |loss change|: 0 when the path was walked finely enough; None without one.

        Infinite if the loss did not change while the integral is not 0: then the ratio says nothing.
        """
        if self.path_integral is None or self.loss_end is None:
            return None
        change = self.loss_end - self.loss_start
        miss = abs(self.path_integral - change)
        if change == 0.0:
            return 0.0 if miss == 0.0 else math.inf
        return miss / abs(change)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON to `path`, replacing it in one step, so that no reader meets half a file.

        Raises:
            ValueError: the folder does not exist.
        """
        path = Path(path)
        if not path.parent.is_dir():
            raise ValueError(
                f"Cannot save contribution scores to '{path}': the folder '{path.parent}' does not exist; make it "
                "first."
            )
        error = self.completeness_error
        # For the human reader of the file only: `load` computes it anew. JSON has no infinity.
        content = {**asdict(self), "completeness_error": None if error == math.inf else error}
        write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ContributionScores":
        """Read what `save` wrote, also in another version: entries that its file did not have take their defaults.

        Raises:
            ValueError: no such file, no JSON, an entry without default missing, an entry of the wrong kind, or a score
                that is negative, NaN or infinite (named).

        Warns:
            UserWarning: the file holds entries that this version does not know (named); they are ignored.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(
                f"Cannot read contribution scores from '{path}' ({error.strerror}): check the path."
            ) from error
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
            raise ValueError(
                f"The file '{path}' holds no valid JSON ({error}): write it with ContributionScores.save."
            ) from error
        if not isinstance(content, dict):
            raise ValueError(f"The file '{path}' holds no contribution scores: write it with ContributionScores.save.")
        try:
            scores = cls(
                **{entry.name: _checked_entry(content, entry) for entry in fields(cls) if _is_due(content, entry)}
            )
        except ValueError as error:
            raise ValueError(f"The file '{path}' holds no usable contribution scores. {error}") from error
        unknown = content.keys() - {entry.name for entry in fields(cls)} - {"completeness_error"}
        if unknown:
            warnings.warn(
                f"The file '{path}' holds entries that this version of colora_peft does not know, which are ignored: "
                f"{some([repr(name) for name in sorted(unknown)], 5)}.",
                stacklevel=2,
            )
        return scores


def mean_scores(measured: Sequence[ContributionScores]) -> dict[str, float]:
    """Mean of measurements of the same layers, each divided by its sum: they count alike, whatever their units.

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
    """Check that `scores` is a table of layer name to finite number >= 0.

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


def _is_due(content: Mapping[str, Any], entry: Field) -> bool:
    """Whether the entry is to be read: it is there, or there is no default for it."""
    return entry.name in content or (entry.default is MISSING and entry.default_factory is MISSING)


def _checked_entry(content: Mapping[str, Any], entry: Field) -> Any:
    """The entry of a score file, of the type its field declares."""
    name, kind = entry.name, entry.type
    if name not in content:
        raise ValueError(
            f"It lacks the entry '{name}', so it was not written by ContributionScores.save: measure again."
        )
    value = content[name]
    if name == "scores":
        check_scores(value, "measure again")
        return value
    if name == "source" and isinstance(value, dict) and all(map(_is_fact, value.values())):
        return value
    if name == "unreached" and isinstance(value, list) and all(isinstance(layer, str) for layer in value):
        return tuple(value)
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if value is None and NoneType in kinds:
        return None
    if float in kinds and _is_finite_number(value):
        return float(value)
    if (int in kinds and _is_finite_number(value) and isinstance(value, int)) or (
        str in kinds and isinstance(value, str)
    ):
        return value
    wanted = _KINDS_IN_WORDS.get(name) or ("a finite number" if float in kinds else kinds[0].__name__)
    raise ValueError(f"The entry '{name}' is {value!r}, not {wanted}: measure again.")


_KINDS_IN_WORDS = {"unreached": "a list of names", "source": "a table of names to texts or finite numbers"}


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_fact(value: Any) -> bool:
    """Whether `value` may stand in `source`."""
    return isinstance(value, str) or _is_finite_number(value)
