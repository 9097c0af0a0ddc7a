"""The cost of an allocation of ranks, layer by layer, as a table for the terminal."""

from collections.abc import Mapping

from .matrix_shape import MatrixShape
from .names import check_same_names

_LAYER_COLUMN_MAX = 48


def checked_shapes(
    scores: Mapping[str, float] | None, ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, MatrixShape]:
    """Returns the shapes of the layers, to which ranks and scores must belong."""
    if not shapes:
        raise ValueError("There is no layer to report: `shapes` is empty. Pass the shape of at least one.")
    check_same_names(ranks, shapes, "ranks")
    if scores is not None:
        check_same_names(scores, shapes, "scores")
    return {layer: MatrixShape(*shape) for layer, shape in shapes.items()}


def budget_line(ranks: Mapping[str, int], shapes: Mapping[str, MatrixShape]) -> str:
    """Returns one line: the share of the weights that is trained, and how many layers that touches."""
    trained = sum(shape.parameters(ranks[layer]) for layer, shape in shapes.items())
    total = sum(shape.size for shape in shapes.values())
    adapted = sum(ranks[layer] > 0 for layer in shapes)
    dense = sum(shape.is_dense(ranks[layer]) for layer, shape in shapes.items())
    return (
        f"{100 * trained / total:.2f}% of the weights trained ({trained:,} of {total:,}), {adapted} of {len(shapes)} "
        f"layers adapted, {dense} of them dense"
    )


def format_allocation_table(
    scores: Mapping[str, float] | None, ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]]
) -> str:
    """Returns a table of at most 100 columns: layer, shape, score, delta, rank, parameters; totals in the last line.

    Args:
        scores: Contribution score by layer name; None leaves the column empty.
        ranks: Rank by layer name, 0 for a layer that is left alone.
        shapes: (d, k) of the weight as a matrix by layer name, in the order of the rows.

    Raises:
        ValueError: There is no layer, or the three name different layers.
    """
    shapes = checked_shapes(scores, ranks, shapes)
    width = min(max(len("layer"), *(len(layer) for layer in shapes)), _LAYER_COLUMN_MAX)
    header = f"{'layer':<{width}}  {'d x k':>11}  {'score':>8}  {'delta':>6}  {'rank':>5}  {'parameters':>10}"
    lines = [header, "-" * len(header)]
    for layer, shape in shapes.items():
        rank = ranks[layer]
        score = "" if scores is None else f"{scores[layer]:.2e}" if scores[layer] else "0"
        shown_rank = "-" if rank == 0 else "dense" if shape.is_dense(rank) else str(rank)
        lines.append(
            f"{_shortened(layer, width):<{width}}  {f'{shape.d} x {shape.k}':>11}  {score:>8}  "
            f"{shape.trained_share(rank):>6.1%}  {shown_rank:>5}  {shape.parameters(rank):>10,}"
        )
    return "\n".join([*lines, "-" * len(header), budget_line(ranks, shapes)])


def _shortened(name: str, width: int) -> str:
    """Returns the name, or its two ends: the last part says which layer of a block it is."""
    if len(name) <= width:
        return name
    tail = (width - 1) * 2 // 3
    return f"{name[: width - 1 - tail]}…{name[-tail:]}"
