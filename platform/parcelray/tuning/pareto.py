"""Several objectives at once: the points that none beats in all, the volume that they dominate, and the knee between them.

Shapes: P points, M objectives.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Mode = Literal["max", "min"]
Values = NDArray[np.float64]


def losses(values_PM: Sequence[Sequence[float]], modes: Sequence[Mode]) -> Values:
    """The same values with less being better in every column; [0, M] for no points."""
    signs = np.array([1.0 if mode == "min" else -1.0 for mode in modes])
    signed_PM: Values = np.asarray(values_PM, dtype=float).reshape(-1, len(modes)) * signs
    return signed_PM


def pareto_front(losses_PM: Values) -> list[int]:
    """Indices of the points that no other one beats: at least as good in all objectives and better in one.

    Points with NaN are never in it; of equal points all are.
    """
    found = []
    for index, point_M in enumerate(losses_PM):
        if np.isnan(point_M).any():
            continue
        beaten = (losses_PM <= point_M).all(1) & (losses_PM < point_M).any(1)
        if not beaten.any():
            found.append(index)
    return found


def hypervolume(losses_PM: Values, reference_M: Values) -> float:
    """Volume that the points dominate below a reference point (Zitzler and Thiele, 1999), exact, by slicing the last objective.

    Args:
        losses_PM: less is better; points that are not below the reference in every objective add nothing.
        reference_M: worst value of each objective.
    """
    inside_PM = losses_PM[(losses_PM < reference_M).all(1)]
    if not len(inside_PM):
        return 0.0
    if inside_PM.shape[1] == 1:
        return float(reference_M[0] - inside_PM.min())
    ordered_PM = inside_PM[np.argsort(inside_PM[:, -1], kind="stable")]
    edges = [*ordered_PM[:, -1], reference_M[-1]]
    volume = 0.0
    for place in range(len(ordered_PM)):
        thickness = edges[place + 1] - edges[place]
        if thickness > 0:
            volume += thickness * hypervolume(ordered_PM[: place + 1, :-1], reference_M[:-1])
    return volume


def knee_point(losses_PM: Values) -> int | None:
    """Index of the point where the front bends most (Das, 1999); None without points.

    It has the smallest sum of losses, each scaled to the front's range: with two objectives the one that is deepest
    below the line through the front's ends, with more the one that is deepest below the plane through the corners of
    the front's box, which need not be points. With one objective, and where the front is one point, it is the best.
    """
    front = pareto_front(losses_PM)
    if not front:
        return None
    points_FM = losses_PM[front]
    low_M, high_M = points_FM.min(0), points_FM.max(0)
    scaled_FM = (points_FM - low_M) / np.where(high_M > low_M, high_M - low_M, 1.0)
    return front[int(scaled_FM.sum(1).argmin())]


def volume_over_time(losses_PM: Values, low_M: Values, high_M: Values) -> list[float]:
    """Hypervolume after each point, as a share of the box between the best and the worst value that each objective can have.

    The box is known before the first point, so the curve only rises, and two searches with the same box can be
    compared.

    Args:
        losses_PM: less is better; what is outside the box counts as on its edge.
        low_M: best value of each objective.
        high_M: worst.
    """
    # A little outside the worst values, or points on the box's edge would add nothing.
    scaled_PM, reference_M = np.clip((losses_PM - low_M) / (high_M - low_M), 0.0, 1.0), np.full(losses_PM.shape[1], 1.1)
    shares = []
    kept: list[int] = []
    for index, point_M in enumerate(scaled_PM):
        if not np.isnan(point_M).any():
            kept = [*kept, index]
            kept = [kept[place] for place in pareto_front(scaled_PM[kept])]
        shares.append(hypervolume(scaled_PM[kept], reference_M) / float(reference_M.prod()) if kept else 0.0)
    return shares
