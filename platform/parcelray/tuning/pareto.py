"""Multi-objective measures: the Pareto front, its hypervolume, and its knee point.

Shapes: P points, M objectives, F points on the front.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Mode = Literal["max", "min"]
Values = NDArray[np.float64]


def losses(values_PM: Sequence[Sequence[float]], modes: Sequence[Mode]) -> Values:
    """Returns the values [P, M] with signs changed so that less is better in every column; [0, M] for no points."""
    signs = np.array([1.0 if mode == "min" else -1.0 for mode in modes])
    signed_PM: Values = np.asarray(values_PM, dtype=float).reshape(-1, len(modes)) * signs
    return signed_PM


def pareto_front(losses_PM: Values) -> list[int]:
    """Returns the indices of the points that no other point dominates.

    A point dominates another if it is at least as good in all objectives and better in one. Points with NaN are never
    on the front; of equal points all are.
    """
    front = []
    for index, point_M in enumerate(losses_PM):
        if np.isnan(point_M).any():
            continue
        dominates_P = (losses_PM <= point_M).all(1) & (losses_PM < point_M).any(1)
        if not dominates_P.any():
            front.append(index)
    return front


def hypervolume(losses_PM: Values, reference_M: Values) -> float:
    """Returns the volume that the points dominate, up to a reference point (Zitzler and Thiele, 1999).

    The result is exact; the volume is sliced along the last objective.

    Args:
        losses_PM: less is better; points that are not better than the reference in every objective add nothing.
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
    for index in range(len(ordered_PM)):
        thickness = edges[index + 1] - edges[index]
        if thickness > 0:
            volume += thickness * hypervolume(ordered_PM[: index + 1, :-1], reference_M[:-1])
    return volume


def knee_point(losses_PM: Values) -> int | None:
    """Returns the index of the knee of the Pareto front (Das, 1999); None without points.

    The knee has the smallest sum of losses, each scaled to the range of the front. With two objectives it is the point
    farthest below the line through the ends of the front. With more it is the point farthest below the plane through
    the corners of the front's bounding box. With one objective it is the best point.
    """
    front = pareto_front(losses_PM)
    if not front:
        return None
    points_FM = losses_PM[front]
    low_M, high_M = points_FM.min(0), points_FM.max(0)
    scaled_FM = (points_FM - low_M) / np.where(high_M > low_M, high_M - low_M, 1.0)
    return front[int(scaled_FM.sum(1).argmin())]


def volume_over_time(losses_PM: Values, low_M: Values, high_M: Values) -> list[float]:
    """Returns the hypervolume after each point, as a share of the box between the best and worst possible values.

    The box is known before the first point, so the values never decrease, and searches with the same box can be
    compared.

    Args:
        losses_PM: less is better; values outside the box are clipped to its edge.
        low_M: best possible value of each objective.
        high_M: worst possible value of each objective.
    """
    # The reference is slightly worse than the worst values, so that points on the edge of the box add volume, too.
    scaled_PM, reference_M = np.clip((losses_PM - low_M) / (high_M - low_M), 0.0, 1.0), np.full(losses_PM.shape[1], 1.1)
    shares = []
    front: list[int] = []
    for index, point_M in enumerate(scaled_PM):
        if not np.isnan(point_M).any():
            front = [*front, index]
            front = [front[each] for each in pareto_front(scaled_PM[front])]
        shares.append(hypervolume(scaled_PM[front], reference_M) / float(reference_M.prod()) if front else 0.0)
    return shares
