"""Tables of adaptive budgets: policies at a few costs, and the calibration of confidence."""

import math
from collections.abc import Iterator

from rich.table import Table

from parcelray.evaluation.adaptive.adaptive_budget import FIXED, AdaptiveStudy, CurvePoint, nearest
from parcelray.evaluation.scoring.intervals import Interval


def adaptive_table(study: AdaptiveStudy) -> Table:
    """Lists every fixed budget, and of each policy the points nearest to the costs between fixed budgets."""
    table = Table(
        "policy",
        "setting",
        "score [95 %]",
        "tokens of the answer",
        "tokens of all passes",
        "GFLOPs",
        "gain at equal tokens",
        "gain at equal FLOPs",
        title=(f"Budgets per image and question, {study.questions} questions, cross-fitted over scenes"),
        caption="Gain: points over the best random mixture of fixed budgets at the same mean cost, paired over scenes.",
    )
    for point in study.curve(FIXED):
        table.add_row(*_cells(point)[:-2], "", "")
    for method in study.methods:
        if method != FIXED:
            table.add_section()
            for point in _shown(study, method):
                table.add_row(*_cells(point))
    return table


def calibration_table(study: AdaptiveStudy) -> Table:
    """Lists the expected calibration errors, and how well confidence ranks answers (AUROC)."""
    table = Table(
        "visual tokens",
        "ECE raw",
        "with temperature",
        "(temperature)",
        "isotonic",
        "AUROC",
        title="Calibration of the confidence",
    )
    for each in study.calibration:
        values = (each.raw, each.with_temperature, each.temperature, each.with_isotonic, each.auroc)
        table.add_row(str(each.num_visual_tokens), *(f"{value:.3f}" for value in values))
    return table


def _shown(study: AdaptiveStudy, method: str) -> Iterator[CurvePoint]:
    points = study.curve(method)
    costs = sorted({math.sqrt(low * high) for low in study.budgets for high in study.budgets if low < high})
    shown = {id(point): point for point in (nearest(points, cost) for cost in costs)}
    if method in study.predictors:
        shown |= {id(point): point for point in points if point.setting == study.predictors[method].price}
    yield from sorted(shown.values(), key=lambda point: point.spent.tokens.value)


def _cells(point: CurvePoint) -> list[str]:
    spent = point.spent
    return [
        point.method,
        f"{point.setting:g}",
        _interval(spent.score.interval, "{:.1f}"),
        f"{spent.answer_tokens.value:.0f}",
        f"{spent.tokens.value:.0f}",
        f"{spent.gflops.value:.4g}",
        _interval(point.gain_at_tokens.interval, "{:+.1f}"),
        _interval(point.gain_at_flops.interval, "{:+.1f}"),
    ]


def _interval(interval: Interval, form: str) -> str:
    return f"{form.format(interval.value)} [{form.format(interval.low)}, {form.format(interval.high)}]"
