"""What an allocation of ranks costs, layer by layer, and the table of it for the terminal."""

from collections.abc import Mapping

from .allocation import adapter_parameters, is_dense

__all__ = ["budget_line", "check_layers", "format_allocation_table", "trained_fraction"]

_LAYER_COLUMN_MAX = 48


def trained_fraction(rank: int, shape: tuple[int, int]) -> float:
    """delta = r (d + k) / (d k), in [0, 1]."""
    return adapter_parameters(rank, *shape) / (shape[0] * shape[1])


def check_layers(
    scores: Mapping[str, float] | None, ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]]
) -> None:
    """Refuse ranks and scores that do not belong to the layers of `shapes`.

    Raises:
        ValueError: no layer at all; a layer without rank or score, a rank for an unknown layer, a negative rank
        (named).
    """
    if not shapes:
        raise ValueError("There is no layer to report: `shapes` is empty. Pass the shape of at least one.")
    for layer in shapes:
        if layer not in ranks:
            raise ValueError(f"Layer '{layer}' has no rank: give one for each layer in `shapes` (0 leaves it alone).")
        if ranks[layer] < 0:
            raise ValueError(f"Layer '{layer}' has rank {ranks[layer]}: ranks are 0 or more.")
        if scores is not None and layer not in scores:
            raise ValueError(f"Layer '{layer}' has no score: measure it, or pass scores=None.")
    unknown = next((layer for layer in ranks if layer not in shapes), None)
    if unknown is not None:
        raise ValueError(f"A rank is given for '{unknown}', which is no layer in `shapes`: use the full module name.")


def budget_line(ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]]) -> str:
    """One line: the share of the weights that is trained, and how many layers that touches."""
    trained = sum(adapter_parameters(ranks[layer], *shape) for layer, shape in shapes.items())
    total = sum(rows * columns for rows, columns in shapes.values())
    adapted = sum(ranks[layer] > 0 for layer in shapes)
    dense = sum(is_dense(ranks[layer], *shape) for layer, shape in shapes.items())
    return (
        f"{100 * trained / total:.2f}% of the weights trained ({trained:,} of {total:,}), {adapted} of {len(shapes)} "
        f"layers adapted, {dense} of them dense"
    )


def format_allocation_table(
    scores: Mapping[str, float] | None, ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]]
) -> str:
    """A table of at most 100 columns: layer, shape d x k, score, delta, rank, parameters; totals in the last line.

    Args:
        scores: layer name -> contribution score; None leaves the column empty.
        ranks: layer name -> rank, 0 for a layer that is left alone.
        shapes: layer name -> (d, k) of the weight as a matrix, in the order of the rows.

    Raises:
        ValueError: names that do not agree (see `check_layers`).
    """
    check_layers(scores, ranks, shapes)
    width = min(max(len("layer"), *(len(layer) for layer in shapes)), _LAYER_COLUMN_MAX)
    header = f"{'layer':<{width}}  {'d x k':>11}  {'score':>8}  {'delta':>6}  {'rank':>5}  {'parameters':>10}"
    lines = [header, "-" * len(header)]
    for layer, (rows, columns) in shapes.items():
        rank, shape = ranks[layer], (rows, columns)
        score = "" if scores is None else f"{scores[layer]:.2e}" if scores[layer] else "0"
        shown_rank = "-" if rank == 0 else "dense" if is_dense(rank, rows, columns) else str(rank)
        lines.append(
            f"{_shortened(layer, width):<{width}}  {f'{rows} x {columns}':>11}  {score:>8}  "
            f"{trained_fraction(rank, shape):>6.1%}  {shown_rank:>5}  {adapter_parameters(rank, *shape):>10,}"
        )
    return "\n".join([*lines, "-" * len(header), budget_line(ranks, shapes)])


def _shortened(name: str, width: int) -> str:
    """The name, or its two ends: the last part says which layer of a block it is."""
    if len(name) <= width:
        return name
    tail = (width - 1) * 2 // 3
    return f"{name[: width - 1 - tail]}…{name[-tail:]}"
