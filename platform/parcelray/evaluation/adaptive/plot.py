"""Plots of adaptive budgets: score against tokens and FLOPs of all passes, and the calibration of confidence."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from parcelray.evaluation.adaptive.adaptive_budget import (
    BEFORE,
    FIXED,
    IMAGE,
    ORACLE,
    QUESTION,
    AdaptiveStudy,
    CurvePoint,
)
from parcelray.evaluation.adaptive.budget_policies import best_mixture
from parcelray.evaluation.scoring.estimate import Estimate
from parcelray.plotting import COLORS, MARKERS, new_figure

_SPECIAL = {ORACLE: ("#666666", "--"), QUESTION: ("#56B4E9", ":"), IMAGE: ("#56B4E9", "-.")}
"""Colour and line style of the methods that are no policies: the upper bound, and ablations of the predictor."""


def plot_adaptive(study: AdaptiveStudy, path: Path, *, title: str) -> None:
    """Plots every policy's curve over its settings; error bars and the band of the predictor are 95 % intervals.

    Args:
        study: the curves and the calibration.
        path: PNG to write.
        title: title of the figure.
    """
    figure = new_figure(15, 5.6)
    by_tokens, by_flops, calibration = figure.subplots(1, 3)
    _curves(by_tokens, study, lambda point: point.spent.tokens)
    _curves(by_flops, study, lambda point: point.spent.gflops)
    by_tokens.set_xscale("log", base=2)
    by_tokens.xaxis.set_major_locator(FixedLocator(list(study.budgets)))
    by_tokens.xaxis.set_minor_locator(NullLocator())
    by_tokens.xaxis.set_major_formatter(ScalarFormatter())
    by_tokens.set_xlabel("visual tokens per image, all passes (mean)")
    by_flops.set_xlabel("GFLOPs per question, all passes (mean)")
    for axes in (by_tokens, by_flops):
        axes.set_ylabel("score, mean over splits")
    _reliability(calibration, study)
    for axes in (by_tokens, by_flops, calibration):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    handles, labels = by_tokens.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def _curves(axes: Axes, study: AdaptiveStudy, cost: Callable[[CurvePoint], Estimate]) -> None:
    points = study.curve(FIXED)
    scores = [point.spent.score.interval for point in points]
    errors = [[each.value - each.low for each in scores], [each.high - each.value for each in scores]]
    x, y = [cost(point).value for point in points], [each.value for each in scores]
    axes.errorbar(x, y, yerr=errors, color="black", marker="o", capsize=3, linestyle="none", label="fixed budgets")
    grid = np.linspace(min(x), max(x), 200)
    mixture = best_mixture(grid, np.tile(np.array(x)[:, None], len(grid)), np.tile(np.array(y)[:, None], len(grid)))
    axes.plot(grid, mixture, color="black", linewidth=1, label="random mixture of fixed budgets")
    for number, method in enumerate(method for method in study.methods if method != FIXED):
        color, line_style = _SPECIAL.get(method, (COLORS[number % len(COLORS)], "-"))
        line = sorted((cost(point).value, point.spent.score.interval) for point in study.curve(method))
        costs = [each for each, _ in line]
        marker = MARKERS[number % len(MARKERS)]
        axes.plot(
            costs,
            [score.value for _, score in line],
            label=method,
            color=color,
            linestyle=line_style,
            marker=marker,
            markersize=3,
            linewidth=1.3,
        )
        if method == BEFORE:
            axes.fill_between(
                costs,
                [score.low for _, score in line],
                [score.high for _, score in line],
                color=color,
                alpha=0.12,
                linewidth=0,
            )


def _reliability(axes: Axes, study: AdaptiveStudy) -> None:
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":")
    for number, each in enumerate(study.calibration):
        color = COLORS[number % len(COLORS)]
        for bins, style, error, name in (
            (each.bins, "--", each.raw, "raw"),
            (each.isotonic_bins, "-", each.with_isotonic, "isotonic"),
        ):
            label = f"{each.num_visual_tokens} tokens, {name}: ECE {error:.2f}"
            x, y = [one.confidence for one in bins], [one.accuracy for one in bins]
            axes.plot(x, y, color=color, linestyle=style, linewidth=1, label=label)
            # The area of a marker is proportional to the number of answers in its bin.
            axes.scatter(x, y, s=[120 * one.n / study.questions for one in bins], color=color, linewidth=0)
    axes.set_xlabel("confidence of the answer")
    axes.set_ylabel("share of correct answers")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.legend(fontsize=7, frameon=False, loc="upper left")
