"""The frontier of score over budget: as a table, as Markdown, as numbers in JSON, and as a plot."""

import json
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter
from rich.table import Column, Table

from parcelray.console import markdown_table
from parcelray.evaluation.scoring.aggregate import Frontier, FrontierPoint
from parcelray.evaluation.scoring.intervals import Interval
from parcelray.plotting import COLORS, MARKERS, new_figure

BASELINES = ("blind", "majority")
"""Methods without a budget: the reference without an image, and the most frequent answer."""
_DODGE = 0.025
"""Horizontal shift between methods, as a fraction of the budget, so that error bars do not cover each other."""


def write_frontier(frontier: Frontier, folder: Path, title: str) -> tuple[Path, Path]:
    """Writes frontier.json and frontier.png into a folder; returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers, picture = folder / "frontier.json", folder / "frontier.png"
    numbers.write_text(json.dumps(frontier.to_dict(), indent=2) + "\n", encoding="utf-8")
    plot_frontier(frontier, picture, title=title)
    return numbers, picture


def frontier_table(frontier: Frontier) -> Table:
    """Creates the table: one row per method and budget, with overall score, retention and family scores in percent."""
    families = _families(frontier)
    fixed = (Column("method", no_wrap=True), Column("tokens", no_wrap=True, justify="right"))
    table = Table(*fixed, "score [95 %]", "retention [95 %]", *families, title=_title(frontier))
    for point in frontier.points:
        table.add_row(*_cells(point, families))
    return table


def frontier_markdown(frontier: Frontier) -> str:
    """Creates the rows of `frontier_table` as a Markdown table."""
    families = _families(frontier)
    header = ["method", "tokens", "score [95 %]", "retention [95 %]", *families]
    return markdown_table([header, *(_cells(point, families) for point in frontier.points)])


def _title(frontier: Frontier) -> str:
    unscored = sum(point.unscored for point in frontier.points)
    retention = f"; retention against {frontier.reference}" if frontier.reference is not None else ""
    return f"Scores in percent{retention}" + (f"; {unscored} answers could not be scored" if unscored else "")


def _families(frontier: Frontier) -> list[str]:
    return list(dict.fromkeys(family for point in frontier.points for family in point.families))


def _cells(point: FrontierPoint, families: list[str]) -> list[str]:
    tokens = str(point.num_visual_tokens) if point.num_visual_tokens else "-"
    retention = _percent(point.retention) if point.retention is not None else "-"
    return [
        point.method,
        tokens,
        _percent(point.overall),
        retention,
        *(_percent(point.families[family]) if family in point.families else "-" for family in families),
    ]


def _percent(interval: Interval) -> str:
    return f"{interval.value:.1f} [{interval.low:.1f}, {interval.high:.1f}]"


def plot_frontier(frontier: Frontier, path: Path, *, title: str) -> None:
    """Plots overall score against visual tokens per image, one line per method, with 95 % error bars.

    Points without visual tokens (blind, majority) become horizontal lines, and the reference becomes a band. If the
    points have FLOPs, a second panel shows the score against them.

    Args:
        frontier: the points.
        path: PNG to write.
        title: title of the plot.
    """
    with_flops = any(point.gflops is not None for point in frontier.points)
    figure = new_figure(13 if with_flops else 9, 5.4)
    panels = figure.subplots(1, 1 + with_flops, sharey=True, squeeze=False)[0]
    for axes, over_flops in zip(panels, (False, True), strict=False):
        draw_frontier(axes, frontier, over_flops=over_flops)
    panels[0].set_ylabel("score, mean over families (%), 95 % intervals")
    figure.suptitle(title)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(path)


def draw_frontier(axes: Axes, frontier: Frontier, *, over_flops: bool = False) -> None:
    """Draws the lines and levels of `plot_frontier`, without title, legend and name of the vertical axis.

    Args:
        axes: where to draw.
        frontier: the points.
        over_flops: whether the horizontal axis is the FLOPs of a prefill instead of the visual tokens.
    """
    lines: dict[str, list[FrontierPoint]] = {}
    for point in frontier.points:
        if point.num_visual_tokens and point.method != frontier.reference:
            lines.setdefault(point.method, []).append(point)
    for index, (method, points) in enumerate(lines.items()):
        ordered = sorted(points, key=lambda point: point.num_visual_tokens)
        shift = 1 + _DODGE * (index - (len(lines) - 1) / 2)
        places = [(point.gflops or 0.0) if over_flops else point.num_visual_tokens * shift for point in ordered]
        _draw_method(axes, method, places, ordered, index)
    _draw_levels(axes, frontier)
    if over_flops:
        axes.set_xlabel("GFLOPs of a prefill with one image")
    else:
        budgets = sorted({point.num_visual_tokens for points in lines.values() for point in points})
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(budgets))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_xlabel("visual tokens per image")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_method(axes: Axes, method: str, places: list[float], points: list[FrontierPoint], index: int) -> None:
    values = [point.overall.value for point in points]
    errors = [
        [value - point.overall.low for value, point in zip(values, points, strict=True)],
        [point.overall.high - value for value, point in zip(values, points, strict=True)],
    ]
    axes.errorbar(
        places,
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
