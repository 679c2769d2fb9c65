"""Points of the figure on answers that are known: random sampling over its seeds, and the best operating points."""

import numpy as np
import pytest

from parcelray.evaluation.scoring.aggregate import FrontierPoint
from parcelray.evaluation.scoring.intervals import Interval
from parcelray.studies.reduction.study import operating_points, random_point

from .known_scores import samples, summary


def test_random_sampling_is_one_point_with_the_interval_over_questions() -> None:
    asked = [*samples(["count"] * 200, "general"), *samples(["word"] * 200, "resolution")]
    full = summary(asked, {64: [True] * 200 + [True] * 100 + [False] * 100})
    seeds = [
        summary(asked, {8: [True] * 100 + [False] * 100 + [True] * 40 + [False] * 160}),
        summary(asked, {8: [True] * 120 + [False] * 80 + [True] * 60 + [False] * 140}),
    ]
    point = random_point("random", seeds, 8, full, 64, 1.5)
    assert point.families["general"].value == pytest.approx(55)
    assert point.families["resolution"].value == pytest.approx(25)
    assert point.overall.value == pytest.approx(40)
    # 55 of 100 and 25 of 50: the mean of the retentions, not the retention of the mean.
    assert point.retention is not None
    assert point.retention.value == pytest.approx((55 + 50) / 2)
    # Per question the mean over seeds is 1, 0.5 or 0: general 100, 20 and 80 of 200, resolution 40, 20 and 140.
    error = 100 * np.sqrt((0.45**2 * 100 + 0.05**2 * 20 + 0.55**2 * 80) / 200 / 200)
    assert point.families["general"].high - point.families["general"].low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert (point.method, point.num_visual_tokens, point.gflops) == ("random", 8, 1.5)


def _point(name: str, score: float, gflops: float | None) -> FrontierPoint:
    return FrontierPoint(name, 8, Interval(score, score, score, 9), None, {}, 0, gflops)


def test_operating_points_are_those_that_nothing_beats_and_the_knee_is_where_they_bend() -> None:
    points = [
        _point("blind", 99, None),
        _point("dear", 31, 10),
        _point("bend", 30, 3),
        _point("beaten", 29, 4),
        _point("cheap", 10, 1),
    ]
    front, knee = operating_points(points)
    assert [point.method for point in front] == ["cheap", "bend", "dear"], "what has no cost is no operating point"
    assert knee is not None
    assert knee.method == "bend"
    assert operating_points([]) == ([], None)
