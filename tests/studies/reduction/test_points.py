"""Points of the figure on known answers: random sampling over its seeds, and the operating points."""

import numpy as np
import pytest

from parcelray.evaluation.scoring.aggregate import FrontierPoint
from parcelray.evaluation.scoring.intervals import Interval
from parcelray.studies.reduction.study import operating_points, random_point

from .known_scores import samples, summary


def test_random_sampling_is_one_point_with_the_interval_over_samples() -> None:
    questions = [*samples(["count"] * 200, "general"), *samples(["word"] * 200, "resolution")]
    full = summary(questions, {64: [True] * 200 + [True] * 100 + [False] * 100})
    seeds = [
        summary(questions, {8: [True] * 100 + [False] * 100 + [True] * 40 + [False] * 160}),
        summary(questions, {8: [True] * 120 + [False] * 80 + [True] * 60 + [False] * 140}),
    ]
    point = random_point("random", seeds, 8, full, 64, 1.5)
    assert point.families["general"].value == pytest.approx(55)
    assert point.families["resolution"].value == pytest.approx(25)
    assert point.overall.value == pytest.approx(40)
    # The retentions are 55 of 100 and 25 of 50. Overall retention is their mean, not the retention of the mean score.
    assert point.retention is not None
    assert point.retention.value == pytest.approx((55 + 50) / 2)
    # The mean over seeds of a sample is 1, 0.5 or 0: for 100, 20 and 80 samples of general, and 40, 20 and 140 of
    # resolution.
    error = 100 * np.sqrt((0.45**2 * 100 + 0.05**2 * 20 + 0.55**2 * 80) / 200 / 200)
    assert point.families["general"].high - point.families["general"].low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert (point.method, point.num_visual_tokens, point.gflops) == ("random", 8, 1.5)


def _point(name: str, score: float, gflops: float | None) -> FrontierPoint:
    return FrontierPoint(name, 8, Interval(score, score, score, 9), None, {}, 0, gflops)


def test_operating_points_are_the_pareto_front_and_the_knee_is_its_bend() -> None:
    points = [
        _point("blind", 99, None),
        _point("expensive", 31, 10),
        _point("knee", 30, 3),
        _point("dominated", 29, 4),
        _point("cheap", 10, 1),
    ]
    front, knee = operating_points(points)
    assert [point.method for point in front] == ["cheap", "knee", "expensive"], (
        "a point without compute is not an operating point"
    )
    assert knee is not None
    assert knee.method == "knee"
    assert operating_points([]) == ([], None)
