"""Plots of a search: Pareto front, splits, parallel coordinates, families, importance, hypervolume, confirmation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, ScalarFormatter

from parcelray.evaluation.scoring.intervals import Interval
from parcelray.plotting import COLORS, MARKERS

_MIN_LABEL_RATIO = 1.25
"""Smallest ratio of two neighbouring budgets that both get a label on the axis."""


class SearchPoint(NamedTuple):
    """A trial in the plane of the first two objectives."""

    x: float
    y: float
    on_front: bool
    is_knee: bool
    on_rule: bool
    """Whether it is the split of the paper's rule at its budget."""


class BaselinePoint(NamedTuple):
    """A baseline model in the same plane, with its 95 % interval."""

    x: float
    y: float
    low: float
    high: float
    num_visual_tokens: int


class FamilyRow(NamedTuple):
    """The chosen and the best trial of one benchmark family."""

    family: str
    tokens: float
    """Visual tokens of the chosen trial."""
    retention: Interval
    """Retention of the chosen trial, percent."""
    best_tokens: float
    """Visual tokens of the trial with the highest retention."""
    best_retention: Interval
    """Retention of that trial, percent."""


def plot_search(
    points: Sequence[SearchPoint],
    baselines: Mapping[str, Sequence[BaselinePoint]],
    rule: Sequence[tuple[float, float]],
    path: Path,
    *,
    title: str,
    axes: tuple[str, str],
    curves: Mapping[str, Sequence[tuple[float, float]]] = {},
) -> None:
    """Draws all trials, their Pareto front, the paper's rule, the baselines, and the curves of adaptive budgets.

    Args:
        points: the trials.
        baselines: points of other models, by name.
        rule: points of the paper's rule, by ascending x; may be empty.
        path: PNG to write.
        title: title of the plot.
        axes: metrics of the x and y axes.
        curves: points of policies that choose the budget per image and question, by name and ascending x.
    """
    figure, plane = _figure((9, 5.4))
    plane.scatter(
        [each.x for each in points], [each.y for each in points], color="#999999", s=16, label="trials", zorder=2
    )
    front = sorted((each for each in points if each.on_front), key=lambda each: each.x)
    plane.plot(
        [each.x for each in front],
        [each.y for each in front],
        color="black",
        marker="o",
        markersize=5,
        linewidth=1.6,
        label="Pareto front",
        zorder=4,
    )
    for knee in (each for each in points if each.is_knee):
        plane.scatter(
            [knee.x], [knee.y], s=150, facecolors="none", edgecolors="black", linewidths=1.6, label="knee", zorder=5
        )
    if rule:
        plane.plot(
            *zip(*rule, strict=True),
            color=COLORS[0],
            marker=MARKERS[0],
            markersize=4,
            linewidth=1.4,
            label="the paper's rule",
            zorder=3,
        )
    for index, (name, members) in enumerate(baselines.items(), 1):
        ordered = sorted(members)
        errors = [[each.y - each.low for each in ordered], [each.high - each.y for each in ordered]]
        color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
        plane.errorbar(
            [each.x for each in ordered],
            [each.y for each in ordered],
            yerr=errors,
            color=color,
            marker=marker,
            markersize=4,
            capsize=2,
            label=name,
        )
    for index, (name, curve) in enumerate(curves.items()):
        color, line_style = COLORS[(len(baselines) + 1 + index) % len(COLORS)], (":", "-", "--")[index % 3]
        plane.plot(*zip(*curve, strict=True), color=color, linestyle=line_style, linewidth=1.6, label=name, zorder=3)
    if axes[0] == "tokens":
        _budget_axis(plane, sorted({each.x for each in points}))
    plane.set_xlabel({"tokens": "visual tokens per image"}.get(axes[0], axes[0]))
    plane.set_ylabel(
        {"retention": "retention, mean over families (%)", "score": "score, mean over families (%)"}.get(
            axes[1], axes[1]
        )
    )
    _finish(figure, plane, path, title)


def plot_splits(
    cells: Mapping[tuple[int, int], float],
    chosen: Mapping[int, int],
    rule: Mapping[int, int],
    path: Path,
    *,
    title: str,
) -> None:
    """Draws a value for every budget and anchor grid.

    The chosen splits have a frame, those of the paper's rule a dot.
    """
    budgets, grids = sorted({budget for budget, _ in cells}), sorted({grid for _, grid in cells})
    values = np.full((len(grids), len(budgets)), np.nan)
    for (budget, grid), value in cells.items():
        values[grids.index(grid), budgets.index(budget)] = value
    figure, plane = _figure((10, 4))
    image = plane.imshow(values, aspect="auto", origin="lower", cmap="viridis")
    middle = float(np.nanmean([np.nanmin(values), np.nanmax(values)]))
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            color = "black" if value > middle else "white"
            plane.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
    for budget, grid in chosen.items():
        plane.add_patch(_frame((budgets.index(budget) - 0.47, grids.index(grid) - 0.45)))
    known = [(budgets.index(budget), grids.index(grid)) for budget, grid in rule.items() if (budget, grid) in cells]
    if known:
        x, y = zip(*known, strict=True)
        plane.scatter(np.array(x) + 0.36, np.array(y) + 0.3, color=COLORS[1], s=14, label="the paper's rule")
    plane.plot([], [], color="red", linewidth=2, label="chosen")
    plane.set_xticks(range(len(budgets)), [str(budget) for budget in budgets])
    plane.set_yticks(range(len(grids)), [f"{grid} x {grid}" if grid else "none" for grid in grids])
    plane.set_xlabel("visual tokens per image")
    plane.set_ylabel("anchor grid")
    figure.colorbar(image, ax=plane)
    _finish(figure, plane, path, title)


def plot_parallel(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], path: Path, *, title: str) -> None:
    """Draws each trial as a line over its parameters, coloured by the last column.

    The line has a gap at a parameter that is not active.
    """
    figure, plane = _figure((max(6.0, 1.7 * len(columns)), 5))
    scales = [_Scale([row.get(column) for row in rows]) for column in columns]
    last = np.array([float(row[columns[-1]]) if row.get(columns[-1]) is not None else np.nan for row in rows])
    low, high = float(np.nanmin(last)), float(np.nanmax(last))
    colors = _colormap()
    for index in np.argsort(last):
        row = rows[index]
        heights = [scale(row.get(column)) for scale, column in zip(scales, columns, strict=True)]
        share = (last[index] - low) / (high - low) if high > low else 1.0
        plane.plot(
            range(len(columns)), heights, color=colors(share), linewidth=1.2, alpha=0.75, marker=".", markersize=4
        )
    for index, scale in enumerate(scales):
        plane.axvline(index, color="black", linewidth=0.8)
        for height, label in scale.ticks:
            plane.text(index - 0.03, height, label, fontsize=7, ha="right", va="center")
    plane.set_xticks(range(len(columns)), [column.rpartition(".")[2] for column in columns], rotation=20)
    plane.set_yticks([])
    plane.set_xlim(-0.6, len(columns) - 0.9)
    plane.spines[:].set_visible(False)
    plane.set_title(title)
    figure.savefig(path)


def plot_families(rows: Sequence[FamilyRow], path: Path, *, title: str) -> None:
    """Draws the retention of each family's chosen and best trial with their 95 % intervals and token counts."""
    figure, plane = _figure((8, 1.6 + 0.7 * len(rows)))
    kinds = (
        ("cheapest within one standard error", 0.14, [(row.retention, row.tokens) for row in rows]),
        ("best", -0.14, [(row.best_retention, row.best_tokens) for row in rows]),
    )
    for index, (label, shift, members) in enumerate(kinds):
        values = [interval.value for interval, _ in members]
        errors = [
            [interval.value - interval.low for interval, _ in members],
            [interval.high - interval.value for interval, _ in members],
        ]
        heights = [position + shift for position in range(len(rows))]
        plane.errorbar(values, heights, xerr=errors, fmt=MARKERS[index], color=COLORS[index], capsize=3, label=label)
        for (interval, tokens), height in zip(members, heights, strict=True):
            plane.annotate(
                f"{tokens:g} tokens", (interval.high, height), textcoords="offset points", xytext=(6, -3), fontsize=8
            )
    plane.set_yticks(range(len(rows)), [row.family for row in rows])
    plane.set_xlabel("retention (%)")
    plane.margins(x=0.15)
    _finish(figure, plane, path, title)


def plot_importance(shares: Mapping[str, float], path: Path, *, title: str) -> None:
    """Draws the importance of each parameter as a bar, in ascending order."""
    figure, plane = _figure((8, 1.2 + 0.4 * len(shares)))
    ordered = sorted(shares.items(), key=lambda each: each[1])
    bars = plane.barh([name for name, _ in ordered], [value for _, value in ordered], color=COLORS[0])
    plane.bar_label(bars, fmt="%.2f", padding=3)
    plane.set_xlim(0, 1.08 * max(shares.values()))
    plane.set_title(title, fontsize=10)
    plane.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def plot_volume(shares: Sequence[float], path: Path, *, title: str) -> None:
    """Draws the hypervolume after each finished trial."""
    figure, plane = _figure((8, 4))
    plane.step(range(1, len(shares) + 1), shares, where="post", color=COLORS[0])
    plane.set_xlabel("finished trials")
    plane.set_ylabel("hypervolume, share of the box")
    plane.set_ylim(bottom=0)
    plane.grid(axis="y", alpha=0.3)
    plane.spines[["top", "right"]].set_visible(False)
    plane.set_title(title)
    figure.savefig(path)


def plot_confirmation(points: Sequence[tuple[float, float, float, float, str]], path: Path, *, title: str) -> None:
    """Draws the retention of separately trained models against that of the supernet, one point per split.

    Args:
        points: for each split, the retention on the supernet, the retention of the trained model with its 95 % interval
            (value, low, high), and a label; percent.
        path: PNG to write.
        title: title of the plot.
    """
    figure, plane = _figure((6.4, 5))
    errors = [[value - low for _, value, low, _, _ in points], [high - value for _, value, _, high, _ in points]]
    plane.errorbar(
        [each[0] for each in points], [each[1] for each in points], yerr=errors, fmt="o", color=COLORS[0], capsize=3
    )
    for supernet, trained, _, _, label in points:
        plane.annotate(label, (supernet, trained), textcoords="offset points", xytext=(7, 4), fontsize=9)
    plane.set_xlabel("retention on the supernet (%)")
    plane.set_ylabel("retention of the separately trained model (%), 95 % intervals")
    plane.set_title(title, fontsize=10)
    plane.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


class _Scale:
    """Maps the values of a column to heights between 0 and 1.

    Up to 12 different numbers are spaced evenly in ascending order, more are placed by size. Other values are spaced
    evenly in alphabetical order.
    """

    def __init__(self, values: Sequence[Any]) -> None:
        items = [_item_of(value) for value in values if value is not None]
        self._numeric = (
            all(isinstance(item, int | float) and not isinstance(item, bool) for item in items) and len(set(items)) > 1
        )
        self._order: list[Any] = sorted(set(items)) if self._numeric else list(dict.fromkeys(sorted(map(str, items))))
        self._heights: dict[Any, float]
        if self._numeric and len(self._order) > 12:
            low, high = self._order[0], self._order[-1]
            self._heights = {value: (value - low) / (high - low) for value in self._order}
            self.ticks = [(0.0, f"{low:.3g}"), (1.0, f"{high:.3g}")]
        else:
            count = max(1, len(self._order) - 1)
            self._heights = {value: index / count for index, value in enumerate(self._order)}
            self.ticks = [
                (height, f"{value:.4g}" if isinstance(value, float) else str(value))
                for value, height in self._heights.items()
            ]

    def __call__(self, value: Any) -> float:
        if value is None:
            return float("nan")
        item = _item_of(value)
        return self._heights.get(item if self._numeric else str(item), float("nan"))


def _item_of(value: Any) -> Any:
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value


def _figure(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _finish(figure: Figure, plane: Axes, path: Path, title: str) -> None:
    plane.set_title(title)
    plane.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path)


def _budget_axis(plane: Axes, budgets: Sequence[float]) -> None:
    plane.set_xscale("log", base=2)
    # The labels of closer neighbours would overlap.
    labelled: list[float] = []
    for budget in sorted(budgets, reverse=True):
        if not labelled or budget * _MIN_LABEL_RATIO <= labelled[-1]:
            labelled.append(budget)
    plane.xaxis.set_major_locator(FixedLocator(labelled))
    plane.xaxis.set_minor_locator(FixedLocator(list(budgets)))
    plane.xaxis.set_major_formatter(ScalarFormatter())
    plane.xaxis.set_minor_formatter(NullFormatter())
    plane.tick_params(axis="x", labelsize=7)


def _frame(corner: tuple[float, float]) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, 0.94, 0.9, fill=False, edgecolor="red", linewidth=2)


def _colormap() -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"]
