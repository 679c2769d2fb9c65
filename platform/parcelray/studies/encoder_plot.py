"""The plot of the encoder study: retention against budget for several encoders."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from parcelray.evaluation.scoring.intervals import Interval
from parcelray.plotting import COLORS, MARKERS


class EncoderPoint(NamedTuple):
    """The result of one method at one budget on the model of one encoder."""

    encoder: str
    method: str
    num_visual_tokens: int
    score: Interval
    """Score, percent."""
    retention: Interval
    """Share of the score of the same model with all tokens, percent."""


def plot_encoders(points: Sequence[EncoderPoint], path: Path, *, title: str) -> None:
    """Draws one panel per method and one line per encoder, with 95 % error bars.

    Args:
        points: points of all encoders at the same budgets.
        path: PNG to write.
        title: title of the figure.
    """
    methods, encoders = (
        list(dict.fromkeys(each)) for each in zip(*((point.method, point.encoder) for point in points), strict=True)
    )
    figure = Figure(figsize=(3.1 * len(methods) + 1.2, 3.8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
    for axes, method in zip(panels, methods, strict=True):
        for index, encoder in enumerate(encoders):
            own = sorted(
                (point for point in points if (point.method, point.encoder) == (method, encoder)),
                key=lambda point: point.num_visual_tokens,
            )
            kept = [point.retention for point in own]
            # The encoders are shifted horizontally, so that their error bars do not overlap.
            x = [point.num_visual_tokens * (1 + 0.04 * (index - (len(encoders) - 1) / 2)) for point in own]
            errors = [[each.value - each.low for each in kept], [each.high - each.value for each in kept]]
            color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
            axes.errorbar(
                x,
                [each.value for each in kept],
                yerr=errors,
                label=encoder,
                color=color,
                marker=marker,
                markersize=4,
                capsize=2,
            )
        axes.axhline(100, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(sorted({point.num_visual_tokens for point in points})))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_title(method, fontsize=10)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    figure.supxlabel("visual tokens per image")
    figure.supylabel("percent of the same model's full score")
    figure.suptitle(title)
    figure.savefig(path)
