"""An evaluation as a picture: score and retention against visual tokens per image."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from parcelray.evaluation.scoring.intervals import Interval
from parcelray.evaluation.scoring.summary import Summary
from parcelray.plotting import COLORS, MARKERS

_MOST_LINES = 12


def plot_evaluation(summary: Summary, path: Path) -> None:
    """Draws one line per split (per family where there are many), and their mean.

    Args:
        summary: the evaluation.
        path: PNG to write.
    """
    figure = Figure(figsize=(12, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    lines = (
        {split.name: [split.name] for split in summary.splits}
        if len(summary.splits) <= _MOST_LINES
        else summary.families
    )
    for number, (name, members) in enumerate(lines.items()):
        _line(left, summary, [summary.mean_score(budget, members).interval for budget in summary.budgets], name, number)
        _line(
            right,
            summary,
            [summary.mean_retention(budget, members).interval for budget in summary.budgets],
            None,
            number,
        )
    if len(summary.splits) > 1:
        _line(
            right,
            summary,
            [summary.mean_retention(budget).interval for budget in summary.budgets],
            "mean of all splits",
            None,
        )
    right.axhline(100, color="black", linewidth=0.8, linestyle=":")
    for axes, title in ((left, "score, on the scale of the papers"), (right, "retention (% of the reference)")):
        axes.xaxis.set_major_locator(FixedLocator(list(range(len(summary.budgets)))))
        axes.xaxis.set_major_formatter(
            FixedFormatter([str(budget) if budget else "blind" for budget in summary.budgets])
        )
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("visual tokens per image")
        axes.set_ylabel(f"{title}, 95 % intervals")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(summary.evaluation.name)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def _line(axes: Axes, summary: Summary, intervals: list[Interval], label: str | None, number: int | None) -> None:
    places = [place + (0.02 * (number or 0) - 0.1) for place in range(len(summary.budgets))]
    errors = [
        [max(0.0, interval.value - interval.low) for interval in intervals],
        [max(0.0, interval.high - interval.value) for interval in intervals],
    ]
    style = (
        {"color": "black", "linewidth": 2.4}
        if number is None
        else {"color": COLORS[number % len(COLORS)], "linewidth": 1.4}
    )
    marker = "o" if number is None else MARKERS[number // len(COLORS) % len(MARKERS)]
    axes.errorbar(
        places, [interval.value for interval in intervals], yerr=errors, label=label, marker=marker, capsize=2, **style
    )  # type: ignore[arg-type]
