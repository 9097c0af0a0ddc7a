"""The result of a contribution estimate: one score per layer, how it was made, and its JSON file."""

import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .files import write_text

__all__ = ["ContributionScores"]


@dataclass(frozen=True)
class ContributionScores:
    """Scores of the adaptable layers for one task, with the record of how they were measured.

    A score sums over a layer's filters, filter j being weight[j]: what lies at j along the weight's first axis. That
    is an output channel or feature, but an input channel of a transposed convolution.

    Attributes:
        scores: layer name -> score (mean |attribution| per weight, >= 0), in network order; 0 for a layer that did
            not move or that the loss never reaches.
        method: "faig" (end weights were given) or "probe" (end weights from a short full tuning).
        num_path_steps: midpoints on the path.
        num_batches: batches that the loss is a mean over.
        loss_start: mean loss at the start weights.
        loss_end: mean loss at the end weights.
        path_integral: signed attribution summed over all parameters, also biases and norms that get no score of their
        own.
        seconds: wall time of the whole estimate, the probe's tuning included.
    """

    scores: dict[str, float]
    method: str
    num_path_steps: int
    num_batches: int
    loss_start: float
    loss_end: float
    path_integral: float
    seconds: float

    @property
    def completeness_error(self) -> float:
        """|path_integral - loss change| / |loss change|: 0 when the path was walked finely enough.

        Infinite if the loss did not change while the integral is not 0: then the ratio says nothing.
        """
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
        content = {**asdict(self), "completeness_error": error if math.isfinite(error) else None}
        write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ContributionScores":
        """Read what `save` wrote.

        Raises:
            ValueError: no such file, no JSON, an entry missing or of the wrong kind, or a score that is negative, NaN
                or infinite (named).
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
        return cls(**{field.name: _checked_entry(content, field.name, field.type, path) for field in fields(cls)})


def _checked_entry(content: dict[str, Any], name: str, kind: Any, path: str | os.PathLike[str]) -> Any:
    """The entry `name` of a score file, of the type its field declares."""
    if name not in content:
        raise ValueError(f"The file '{path}' lacks the entry '{name}': write it with ContributionScores.save.")
    value = content[name]
    if name == "scores":
        return _checked_scores(value, path)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if kind is float and is_number:
        return float(value)
    if isinstance(value, kind) and (kind is str or is_number):
        return value
    raise ValueError(
        f"In '{path}' the entry '{name}' is {value!r}, not a {'finite number' if kind is float else kind.__name__}: "
        "measure again."
    )


def _checked_scores(scores: Any, path: str | os.PathLike[str]) -> dict[str, float]:
    if not isinstance(scores, dict) or not scores:
        raise ValueError(f"In '{path}' the entry 'scores' is not a table of layer name to score: measure again.")
    for layer, score in scores.items():
        is_number = isinstance(score, (int, float)) and not isinstance(score, bool)
        if not is_number or not math.isfinite(score) or score < 0:
            raise ValueError(
                f"In '{path}' the score of layer '{layer}' is {score!r}, not a finite number >= 0: measure again."
            )
    return {layer: float(score) for layer, score in scores.items()}
