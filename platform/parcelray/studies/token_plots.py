"""Plots of the studies of anchors and query tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, ScalarFormatter

from parcelray.analysis.spectra import ANCHORS, MAPS, PATCHES, QUERIES, Spectrum
from parcelray.analysis.token_analysis import PartMeasures
from parcelray.evaluation.scoring.estimate import Estimate
from parcelray.plotting import COLORS, MARKERS, new_figure

_Line = Literal["-", "--", ":", "-."]
_LINE_OF_GRID: dict[str, _Line] = {ANCHORS: "-", QUERIES: "--", MAPS: ":", PATCHES: "-."}
_LINE_OF_PART: dict[str, _Line] = {"anchors": "-", "queries": "--", "all": ":"}
_PANELS = {
    "effective rank": ("effective_rank",),
    "mean cosine of pairs": ("mean_cosine",),
    "variance from the image, share": ("image_share",),
    "attention entropy, share of log N": ("attention_entropy_share",),
    "coverage of the patches, share": ("coverage",),
    "attention to the own place, x uniform": ("own_place",),
    "attention constant in the anchors' cells, share": ("anchor_overlap",),
    "attended patches explained by anchors, R$^2$": ("attended_by_anchors",),
    "tokens explained by anchors (dashed),\nalso by attended patches (solid), R$^2$": (
        "tokens_by_anchors",
        "tokens_by_patches",
    ),
}
"""Measures of each panel by title."""


def plot_spectra(
    pooled: Sequence[Spectrum], spectra: Sequence[Spectrum], path: Path, *, pooled_budget: int, budget: int
) -> None:
    """Draws the cumulative concentration of pooled grids and the normalised radial power, with 95 % bands.

    Args:
        pooled: anchors at `pooled_budget`; may be empty.
        spectra: anchors, queries and maps at `budget`, and patch grids.
        path: PNG to write.
        pooled_budget: budget of the first panel.
        budget: budget of the second panel.
    """
    models = list(dict.fromkeys(each.grid.model for each in (*pooled, *spectra)))
    figure = new_figure(11, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
    for each in pooled:
        index = models.index(each.grid.model)
        _curve(left, each.concentration, index, "-", f"{Path(each.grid.model).name} anchors")
    left.set_title(f"pooled grids at {pooled_budget} tokens", fontsize=10)
    left.set_ylabel("cumulative concentration C(r)")
    left.set_ylim(0, 1.03)
    for each in spectra:
        index, part = models.index(each.grid.model), each.grid.part
        _curve(right, each.power, index, _LINE_OF_GRID[part], f"{Path(each.grid.model).name} {part}")
    right.set_title(f"anchors and queries at {budget} tokens, and references", fontsize=10)
    right.set_ylabel("normalised radial mean power P(r)")
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xlabel("radius r, cycles per image")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if pooled:
        left.legend(frameon=False, fontsize=8)
    else:
        left.text(0.5, 0.5, "no model has this budget", ha="center", transform=left.transAxes)
    right.legend(frameon=False, fontsize=8, handlelength=3.5, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)


def plot_tokens(found: Mapping[str, Sequence[PartMeasures]], path: Path) -> None:
    """Draws the measures over the budget, one panel per measure, one colour per model and one line style per part."""
    figure = new_figure(11, 9)
    budgets = sorted({each.num_visual_tokens for parts in found.values() for each in parts})
    for axes, (title, measures) in zip(figure.subplots(3, 3).flat, _PANELS.items(), strict=True):
        for index, parts in enumerate(found.values()):
            for measure in measures:
                for part, line in _LINE_OF_PART.items():
                    points = [each for each in parts if each.part == part and measure in each.measures]
                    _points(axes, points, measure, index, "-" if measure == "tokens_by_patches" else line)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("visual tokens per image", fontsize=8)
        axes.set_xscale("log", base=2)
        axes.set_xlim(budgets[0] / 1.15, budgets[-1] * 1.15)
        axes.xaxis.set_major_locator(FixedLocator(budgets))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles = [
        Line2D([], [], color=COLORS[index % len(COLORS)], marker=MARKERS[index % len(MARKERS)], label=Path(name).name)
        for index, name in enumerate(found)
    ]
    handles += [Line2D([], [], color="black", linestyle=line, label=part) for part, line in _LINE_OF_PART.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
    figure.savefig(path)


def _curve(axes: Axes, values: Sequence[Estimate], index: int, line: _Line, label: str) -> None:
    """Draws a line with its band over the radii 1..R."""
    intervals = [each.interval for each in values]
    radii, color = range(1, len(values) + 1), COLORS[index % len(COLORS)]
    # References have no markers.
    marker = "" if label.endswith((MAPS, PATCHES)) else MARKERS[index % len(MARKERS)]
    axes.plot(
        radii, [each.value for each in intervals], linestyle=line, color=color, marker=marker, markersize=4, label=label
    )
    axes.fill_between(
        radii, [each.low for each in intervals], [each.high for each in intervals], color=color, alpha=0.2, linewidth=0
    )


def _points(axes: Axes, points: Sequence[PartMeasures], measure: str, index: int, line: _Line) -> None:
    intervals = [each.measures[measure].interval for each in points]
    axes.errorbar(
        [each.num_visual_tokens for each in points],
        [each.value for each in intervals],
        yerr=[[each.value - each.low for each in intervals], [each.high - each.value for each in intervals]],
        linestyle=line,
        color=COLORS[index % len(COLORS)],
        marker=MARKERS[index % len(MARKERS)],
        markersize=4,
        capsize=2,
    )
