"""The figure of an allocation: contribution and rank of each layer.

Matplotlib, an extra, is imported inside the functions and used without pyplot: no window, no global state.
"""

import importlib.util
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from .matrix_shape import MatrixShape
from .table import budget_line, checked_shapes

# Shares below this look alike in the figure: the colour scale is logarithmic, as shares span decades.
_SMALLEST_SHARE = 0.01
_SCORE_DECADES_SHOWN = 8
_MAX_GROUPS = 28


def check_figures_can_be_drawn() -> None:
    """Refuses to begin work at whose end there is a figure that cannot be drawn.

    Raises:
        ValueError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            'Figures need matplotlib: run `pip install matplotlib`, or in a clone `pip install -e ".[examples]"`.'
        )


def plot_contributions(
    scores: Mapping[str, float] | None,
    ranks: Mapping[str, int],
    shapes: Mapping[str, tuple[int, int]],
    path: str | os.PathLike[str],
) -> None:
    """Draws score and rank of each layer in network order, coloured by its trained share delta, to an image file.

    The figure follows the overview figure of CoLoRA (arXiv 2408.01099). Scores and ranks are on log scales. A cross
    stands for a score of 0 and for rank 0, a diamond for a dense delta. The score of a layer of rank 0 is grey.

    Args:
        scores: Contribution score by layer name; None draws the ranks alone.
        ranks: Rank by layer name, 0 for a layer that is left alone.
        shapes: (d, k) of the weight as a matrix by layer name, in network order.
        path: File to write; its ending chooses the format (.png, .pdf, .svg).

    Raises:
        ValueError: matplotlib is not installed, there is no layer, or the three name different layers.
    """
    check_figures_can_be_drawn()
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    shapes = checked_shapes(scores, ranks, shapes)
    num_panels = 1 if scores is None else 2
    # Made without pyplot, a figure draws on the Agg canvas and registers nowhere.
    width, height = min(max(8.0, 3.0 + 0.1 * len(shapes)), 18.0), 1.4 + 2.3 * num_panels
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.subplots(num_panels, 1, sharex=True)
    axes = list(figure.axes)
    colormap, norm = colormaps["viridis_r"], LogNorm(_SMALLEST_SHARE, 1.0, clip=True)
    shares = [shape.trained_share(ranks[layer]) for layer, shape in shapes.items()]
    colors = [colormap(norm(share)) if share else "0.72" for share in shares]
    if scores is not None:
        _draw_scores(axes[0], [scores[layer] for layer in shapes], colors)
    _draw_ranks(axes[-1], ranks, shapes, colors)
    _mark_groups(axes, list(shapes))
    axes[0].set_title(budget_line(ranks, shapes), fontsize=11, loc="left")
    _add_colorbar(figure, axes, colormap, norm)
    figure.savefig(path, dpi=150)


def _draw_scores(axes: Any, scores: Sequence[float], colors: Sequence[Any]) -> None:
    positive = [score for score in scores if score > 0]
    top = max(positive, default=1.0)
    # Bars of a log scale have no natural foot: half a decade below the smallest, unless that lies out of sight anyway.
    bottom = max(min(positive, default=0.1) / 3, top * 10.0**-_SCORE_DECADES_SHOWN)
    heights = [max(score, bottom) - bottom for score in scores]
    axes.set_yscale("log")
    axes.bar(range(len(scores)), heights, bottom=bottom, color=colors, width=0.85)
    _mark_zeros(axes, [index for index, score in enumerate(scores) if score == 0], bottom * 1.3, "score 0")
    axes.set_ylim(bottom, top * 2)
    axes.set_ylabel("contribution\n(mean per weight)")


def _draw_ranks(axes: Any, ranks: Mapping[str, int], shapes: Mapping[str, MatrixShape], colors: Sequence[Any]) -> None:
    """Draws ranks on a log2 scale; a dense layer stands at its full rank, min(d, k)."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    dense = [index for index, (layer, shape) in enumerate(shapes.items()) if shape.is_dense(ranks[layer])]
    heights = [shape.stored_rank(ranks[layer]) for layer, shape in shapes.items()]
    bottom, top = 0.5, 3.2 * max(1, *heights)
    axes.set_yscale("log", base=2)
    bars = [max(height - bottom, 0) for height in heights]
    axes.bar(range(len(heights)), bars, bottom=bottom, color=colors, width=0.85)
    _mark_zeros(axes, [index for index, height in enumerate(heights) if height == 0], bottom * 1.25, "rank 0")
    if dense:
        axes.scatter(dense, [heights[i] * 1.45 for i in dense], marker="D", s=16, color="black", label="dense delta")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper right", fontsize=8, ncols=2, framealpha=0.9)
    axes.set_ylim(bottom, top)
    axes.yaxis.set_major_locator(LogLocator(base=2, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value >= 1 else ""))
    axes.set_ylabel("rank")


def _mark_zeros(axes: Any, positions: Sequence[int], height: float, meaning: str) -> None:
    """Draws a grey cross at the foot of each layer that has nothing."""
    if positions:
        heights = [height] * len(positions)
        axes.scatter(positions, heights, marker="x", s=14, linewidths=1, color="0.45", zorder=3, label=meaning)


def _mark_groups(axes: Sequence[Any], layers: Sequence[str]) -> None:
    """Names the stages of the network below the last panel and shades every other one."""
    groups = _layer_groups(layers)
    for panel in axes:
        for _, first, count in groups[1::2]:
            panel.axvspan(first - 0.5, first + count - 0.5, color="0.93", zorder=-2, linewidth=0)
        panel.grid(axis="y", color="0.85", linewidth=0.6, zorder=-1)
        panel.set_axisbelow(True)
        panel.set_xlim(-0.7, len(layers) - 0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(axis="x", length=0)
    axes[-1].set_xticks([first + (count - 1) / 2 for _, first, count in groups])
    axes[-1].set_xticklabels([name for name, _, _ in groups], rotation=90, fontsize=8)


def _layer_groups(layers: Sequence[str]) -> list[tuple[str, int, int]]:
    """Returns (stage, first position, number of layers) of each run of layers of one stage.

    The stage is the name up to its first number ("encoders.2"). It ends before the number ("encoders") if there were
    too many stages to read, and for stages of one layer ("ups.0", "ups.1"). A prefix common to all layers is left out.
    """
    parts = [layer.split(".") for layer in layers]
    common = len(os.path.commonprefix([part[:-1] for part in parts]))
    parts = [part[common:] for part in parts]

    def stage(part: list[str], with_number: bool) -> str:
        number = next((index for index, piece in enumerate(part) if piece.isdigit()), None)
        end = 1 if number is None else number + with_number
        return ".".join(part[: max(end, 1)])

    sizes = Counter(stage(part, True) for part in parts)
    for with_number in (True, False):
        names = [stage(part, with_number and sizes[stage(part, True)] > 1) for part in parts]
        groups, first = [], 0
        for name, run in groupby(names):
            count = len(list(run))
            groups.append((name, first, count))
            first += count
        if len(groups) <= _MAX_GROUPS:
            return groups
    # Still too many to read: name some of them, at even distances.
    step = math.ceil(len(groups) / _MAX_GROUPS)
    return [(name if index % step == 0 else "", *rest) for index, (name, *rest) in enumerate(groups)]


def _add_colorbar(figure: Any, axes: Sequence[Any], colormap: Any, norm: Any) -> None:
    from matplotlib.cm import ScalarMappable

    ticks = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
    bar = figure.colorbar(ScalarMappable(norm, colormap), ax=list(axes), pad=0.01, aspect=30)
    bar.set_ticks(ticks, labels=["≤ 1%", *(f"{tick:.0%}" for tick in ticks[1:-1]), "dense"])
    bar.ax.minorticks_off()
    bar.set_label("delta: share of the layer's weights trained", fontsize=9)
