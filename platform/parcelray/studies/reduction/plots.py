"""Figures of the reduction study: accuracy against compute, and retention by kind of question."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

from parcelray.evaluation.scoring.aggregate import Frontier, FrontierPoint
from parcelray.evaluation.scoring.intervals import Interval
from parcelray.plotting import COLORS, MARKERS

_COLUMNS = 3


def plot_compute(
    frontier: Frontier, groups: Mapping[str, Sequence[str]], path: Path, *, title: str, baselines: Sequence[str]
) -> None:
    """Draws the overall score against the GFLOPs of a prefill, with 95 % error bars.

    Args:
        frontier: points with `gflops`; the blind model and the reference are drawn as horizontal lines.
        groups: names of the methods in each panel, by panel title.
        path: PNG to write.
        title: title of the figure.
        baselines: methods that are drawn as grey bands in every panel.
    """
    methods: dict[str, list[FrontierPoint]] = {}
    for point in frontier.points:
        if point.gflops is not None:
            methods.setdefault(point.method, []).append(point)
    rows = math.ceil(len(groups) / _COLUMNS)
    figure = Figure(figsize=(4.6 * _COLUMNS, 4.4 * rows), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, _COLUMNS, sharex=True, sharey=True, squeeze=False)
    panels = [axes for row in grid for axes in row]
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    for axes, (name, members) in zip(panels, groups.items(), strict=False):
        _levels(axes, frontier)
        for baseline, style in zip((each for each in baselines if each in methods), ("--", "-."), strict=False):
            _band(axes, _by_compute(methods[baseline]), baseline, style)
        for index, method in enumerate(member for member in members if member in methods):
            _line(axes, method, _by_compute(methods[method]), index)
        axes.set_title(name, fontsize=10)
        # Budgets are approximately a geometric sequence, so compute is, too.
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        own = [each for each in zip(*axes.get_legend_handles_labels(), strict=True) if each[1] in members]
        axes.legend(
            *zip(*own, strict=True), fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.12), ncols=2
        )
    # The lines that all panels share have one legend, on the right.
    shared = [
        each
        for each in zip(*panels[0].get_legend_handles_labels(), strict=True)
        if each[1] not in next(iter(groups.values()))
    ]
    figure.legend(*zip(*shared, strict=True), loc="outside right upper", frameon=False, fontsize=8)
    figure.supxlabel("GFLOPs of the prefill of one image")
    figure.supylabel("score, mean over families (%), 95 % intervals")
    figure.suptitle(title)
    figure.savefig(path)


def _by_compute(points: list[FrontierPoint]) -> list[FrontierPoint]:
    return sorted(points, key=lambda point: point.gflops or 0.0)


def _line(axes: Axes, method: str, points: list[FrontierPoint], index: int) -> None:
    values = [point.overall.value for point in points]
    errors = [
        [point.overall.value - point.overall.low for point in points],
        [point.overall.high - point.overall.value for point in points],
    ]
    color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
    style = "-" if index < len(COLORS) else ":"
    axes.errorbar(
        [point.gflops or 0.0 for point in points],
        values,
        yerr=errors,
        label=method,
        color=color,
        marker=marker,
        linestyle=style,
        markersize=4,
        capsize=2,
        elinewidth=0.8,
    )


def _band(axes: Axes, points: list[FrontierPoint], name: str, style: str) -> None:
    x = [point.gflops or 0.0 for point in points]
    axes.fill_between(
        x,
        [point.overall.low for point in points],
        [point.overall.high for point in points],
        color="black",
        alpha=0.12,
        linewidth=0,
    )
    axes.plot(x, [point.overall.value for point in points], color="black", linewidth=1, linestyle=style, label=name)


def _levels(axes: Axes, frontier: Frontier) -> None:
    for point in frontier.points:
        if point.method == frontier.reference:
            axes.axhline(point.overall.value, color="black", linewidth=1, label=f"all {point.num_visual_tokens} tokens")
        elif not point.num_visual_tokens:
            axes.axhline(point.overall.value, color="#666666", linewidth=1, linestyle=":", label=point.method)


def plot_kinds(kept: Sequence[tuple[str, str, int, Interval]], path: Path, *, title: str, shown: Sequence[str]) -> None:
    """Draws retention against visual tokens, one panel per kind of question.

    Args:
        kept: method, kind of question, visual tokens, and retention in percent of the full score.
        path: PNG to write.
        title: title of the figure.
        shown: methods that are drawn in colour, with 95 % error bars; the others are grey.
    """
    kinds = list(dict.fromkeys(kind for _, kind, _, _ in kept))
    figure = Figure(figsize=(3.6 * len(kinds) + 1.6, 4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, kind in zip(figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds, strict=True):
        lines: dict[str, list[tuple[int, Interval]]] = {}
        for method, own, budget, interval in kept:
            if own == kind:
                lines.setdefault(method, []).append((budget, interval))
        for method, points in lines.items():
            if method not in shown:
                axes.plot(
                    [budget for budget, _ in sorted(points)],
                    [each.value for _, each in sorted(points)],
                    color="#bbbbbb",
                    linewidth=0.8,
                )
        for index, method in enumerate(each for each in shown if each in lines):
            budgets, intervals = zip(*sorted(lines[method]), strict=True)
            errors = [[each.value - each.low for each in intervals], [each.high - each.value for each in intervals]]
            color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
            axes.errorbar(
                budgets,
                [each.value for each in intervals],
                yerr=errors,
                label=method,
                color=color,
                marker=marker,
                markersize=4,
                capsize=2,
                linewidth=1.2,
            )
        axes.axhline(100, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_title(kind, fontsize=10)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    figure.supxlabel("visual tokens per image")
    figure.supylabel("percent of the full score")
    figure.suptitle(title)
    figure.savefig(path)
