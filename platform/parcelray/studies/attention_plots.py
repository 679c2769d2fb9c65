"""Plots of the studies of attention and redundancy."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from parcelray.analysis.attention_maps import AttentionMaps, Floats
from parcelray.analysis.leave_token_out import Validity
from parcelray.analysis.redundancy_profile import SHARES, RedundancyProfile
from parcelray.analysis.saliency import SaliencyReport
from parcelray.plotting import COLORS, MARKERS

_MAX_NUMBERED_CELLS = 64
"""Largest number of cells for which a matrix shows its values."""


def plot_heat_maps(image: Image.Image, prompts: Sequence[str], maps: AttentionMaps, index: int, path: Path) -> None:
    """Draws the attention of the last word in each layer, averaged over heads, with one row per prompt.

    The first column shows the image, the last one the attention of the vision tower, if it has any.

    Args:
        image: the image.
        prompts: the prompts.
        maps: attention maps of all images.
        index: index of the image in the maps.
        path: PNG to write.
    """
    layers = maps.last_word_IPLHN.shape[2]
    has_class = maps.class_attention_IN is not None
    figure = Figure(figsize=(1.9 * (layers + 1 + has_class), 2.1 * len(prompts)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(prompts), layers + 1 + has_class, squeeze=False)
    for row, prompt in enumerate(prompts):
        cells = grid[row]
        cells[0].imshow(image)
        cells[0].set_ylabel(_wrapped(prompt), fontsize=7)
        for layer in range(layers):
            _heat(cells[1 + layer], image, maps.last_word_IPLHN[index, row, layer].mean(axis=0), maps.grid_size)
        if maps.class_attention_IN is not None:
            _heat(cells[-1], image, maps.class_attention_IN[index], maps.grid_size)
        for axes in cells:
            axes.set_xticks([])
            axes.set_yticks([])
    for layer in range(layers):
        grid[0][1 + layer].set_title(f"decoder layer {layer}", fontsize=8)
    if has_class:
        grid[0][-1].set_title("vision tower", fontsize=8)
    figure.savefig(path)


def plot_agreement(reports: Mapping[str, SaliencyReport], path: Path) -> None:
    """Draws the agreement of rankings between prompts for each layer and head, and between layers.

    Args:
        reports: reports by definition of saliency; each is one row.
        path: PNG to write.
    """
    first = next(iter(reports.values()))
    layers, heads = len(first.by_head), len(first.by_head[0])
    figure = Figure(
        figsize=(2 * (max(3.2, 0.5 * heads) + max(3.2, 0.5 * layers)), max(2.9, 0.45 * layers) * len(reports) + 0.4),
        dpi=130,
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(reports), 4, squeeze=False)
    for row, (name, report) in zip(grid, reports.items(), strict=True):
        by_head, by_layer = report.by_head, report.between_layers
        _matrix(
            row[0],
            [[each.spearman.value for each in line] for line in by_head],
            f"{name}: between prompts\nSpearman",
            "head",
            "layer",
        )
        _matrix(
            row[1],
            [[each.jaccard.value for each in line] for line in by_head],
            "between prompts\nJaccard of the top 11 %",
            "head",
            "layer",
        )
        _matrix(
            row[2],
            [[each.spearman.value for each in line] for line in by_layer],
            "between layers\nSpearman",
            "layer",
            "layer",
        )
        _matrix(
            row[3],
            [[each.jaccard.value for each in line] for line in by_layer],
            "between layers\nJaccard of the top 11 %",
            "layer",
            "layer",
        )
    figure.savefig(path)


def plot_validity(result: Mapping[str, Validity], path: Path) -> None:
    """Draws the correlation of each measure with the loss of leaving a token out, with 95 % intervals.

    Markers are filled where the corrected p-value is below 0.05.
    """
    names = sorted(result, key=lambda name: result[name].correlation.value)
    figure = Figure(figsize=(7.5, 0.34 * len(names) + 1.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for position, name in enumerate(names):
        value, low, high, _ = result[name].correlation
        fill = COLORS[0] if result[name].p_holm < 0.05 else "white"
        axes.errorbar(
            [value],
            [position],
            xerr=[[value - low], [high - value]],
            color=COLORS[0],
            marker="o",
            markerfacecolor=fill,
            capsize=3,
        )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel(
        "Spearman correlation with the loss of likelihood without the token (95 % intervals; filled: corrected p <"
        " 0.05)",
        fontsize=8,
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def plot_redundancy(profiles: Mapping[str, RedundancyProfile], path: Path) -> None:
    """Draws the share of the projected tokens' variance that a few cluster centres explain, one line per model."""
    figure = Figure(figsize=(7, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, (name, profile) in enumerate(profiles.items()):
        points = [profile.measures[f"projected tokens: variance that {share:.0%} centres explain"] for share in SHARES]
        values = np.array([point.value for point in points])
        errors = [values - [point.low for point in points], [point.high for point in points] - values]
        shares = [100 * share for share in SHARES]
        axes.errorbar(
            shares,
            100 * values,
            yerr=100 * np.array(errors),
            label=name,
            color=COLORS[index % len(COLORS)],
            marker=MARKERS[index % len(MARKERS)],
            capsize=3,
        )
    axes.set_xlabel("clusters, % of the tokens")
    axes.set_ylabel("variance explained, %")
    axes.set_ylim(0, 100)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def _matrix(axes: Axes, values: Sequence[Sequence[float]], title: str, x: str, y: str) -> None:
    axes.imshow(values, cmap="viridis", vmin=0, vmax=1)
    if len(values) * len(values[0]) <= _MAX_NUMBERED_CELLS:
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                axes.text(
                    column,
                    row,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="black" if value > 0.6 else "white",
                )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)


def _heat(axes: Axes, image: Image.Image, values_N: Floats, grid: int) -> None:
    axes.imshow(image.convert("L"), cmap="gray", alpha=0.5)
    axes.imshow(
        values_N.reshape(grid, grid),
        cmap="inferno",
        alpha=0.75,
        extent=(0, image.width, image.height, 0),
        interpolation="nearest",
    )


def _wrapped(text: str, width: int = 22) -> str:
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + len(word) >= width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return "\n".join([*lines, line])
