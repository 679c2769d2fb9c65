"""The frontier as a picture."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from parcelray.evaluation.scoring.aggregate import Frontier, FrontierPoint
from parcelray.plotting import COLORS, MARKERS

_DODGE = 0.025
"""Each method's points stand aside by this fraction of the budget, so that error bars do not hide each other."""


def plot_frontier(frontier: Frontier, path: Path, *, title: str) -> None:
    """Draws overall score against visual tokens per image, one line per method, with 95 % error bars.

    Args:
        frontier: the points; those without visual tokens (blind, majority) become horizontal lines, the reference a
            band.
        path: PNG to write.
        title: above the axes.
    """
    figure = Figure(figsize=(9, 5.4), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lines: dict[str, list[FrontierPoint]] = {}
    for point in frontier.points:
        if point.num_visual_tokens and point.method != frontier.reference:
            lines.setdefault(point.method, []).append(point)
    for index, (method, points) in enumerate(lines.items()):
        _draw_method(axes, method, sorted(points, key=lambda point: point.num_visual_tokens), index, len(lines))
    _draw_levels(axes, frontier)
    budgets = sorted({point.num_visual_tokens for points in lines.values() for point in points})
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(budgets))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("visual tokens per image")
    axes.set_ylabel("score, mean over families (%), 95 % intervals")
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path)


def _draw_method(axes: Axes, method: str, points: list[FrontierPoint], index: int, count: int) -> None:
    shift = 1 + _DODGE * (index - (count - 1) / 2)
    values = [point.overall.value for point in points]
    errors = [
        [value - point.overall.low for value, point in zip(values, points, strict=True)],
        [point.overall.high - value for value, point in zip(values, points, strict=True)],
    ]
    axes.errorbar(
        [point.num_visual_tokens * shift for point in points],
        values,
        yerr=errors,
        label=method,
        color=COLORS[index % len(COLORS)],
        marker=MARKERS[index % len(MARKERS)],
        capsize=3,
        linewidth=1.8,
    )


def _draw_levels(axes: Axes, frontier: Frontier) -> None:
    styles = {"blind": ("#666666", ":"), "majority": ("#666666", "--")}
    for point in frontier.points:
        value, low, high = point.overall[:3]
        if point.method == frontier.reference:
            axes.axhspan(low, high, color="black", alpha=0.08, linewidth=0)
            axes.axhline(value, color="black", linewidth=1.2, label=f"{point.method}, {point.num_visual_tokens} tokens")
        elif not point.num_visual_tokens:
            color, style = styles.get(point.method, ("#999999", "-."))
            axes.axhline(value, color=color, linestyle=style, linewidth=1.2, label=point.method)
