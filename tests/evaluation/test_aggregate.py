"""Scores, intervals and retention, against numbers computed by hand."""

import math

import numpy as np
import pytest

from parcelray.evaluation.aggregate import Frontier, family_scores, frontier_point, overall, retention, unscored
from parcelray.evaluation.intervals import bootstrap_difference, bootstrap_mean, cluster_draws, wilson
from parcelray.evaluation.score import Score


def _scores(values: dict[str, list[float]], budget: int = 64) -> list[Score]:
    return [
        Score(f"{family}-{index}", "mini", family, f"{family}-task", f"{family}-{index // 2}", budget, "x", value)
        for family, members in values.items()
        for index, value in enumerate(members)
    ]


def test_wilson_has_the_textbook_values() -> None:
    # 15 of 20: centre (0.75 + z2 / 40) / (1 + z2 / 20) with z2 = 3.8415.
    assert wilson(15, 20)[:3] == pytest.approx((0.75, 0.5313, 0.8881), abs=1e-4)
    assert wilson(0, 10)[:3] == pytest.approx((0.0, 0.0, 0.2775), abs=1e-4)
    assert math.isnan(wilson(0, 0).value)


def test_the_bootstrap_of_independent_samples_has_the_normal_width() -> None:
    values = [float(index % 2) for index in range(400)]
    interval = bootstrap_mean(values, [str(index) for index in range(400)])
    assert interval.value == 0.5
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.08)


def test_samples_of_one_scene_count_as_one() -> None:
    values = [float(index // 4 % 2) for index in range(400)]
    clustered = bootstrap_mean(values, [str(index // 4) for index in range(400)])
    assert clustered.high - clustered.low == pytest.approx(2 * 1.96 * 0.5 / 10, rel=0.1)


def test_a_paired_difference_knows_that_the_samples_are_the_same() -> None:
    values = [float(index % 2) for index in range(200)]
    better = [value + 0.1 for value in values]
    interval = bootstrap_difference(better, values, [str(index) for index in range(200)])
    assert interval[:3] == pytest.approx((0.1, 0.1, 0.1))


def test_families_that_share_their_scenes_vary_together() -> None:
    values = [float(index % 2) for index in range(200)]
    scenes = [str(index) for index in range(200)]
    alike = cluster_draws({"a": (values, scenes), "b": (values, scenes)}, seed=1)
    apart = cluster_draws({"a": (values, scenes), "b": (values, [f"other {scene}" for scene in scenes])}, seed=1)
    assert (alike["a"] == alike["b"]).all()
    assert abs(np.corrcoef(apart["a"], apart["b"])[0, 1]) < 0.1
    # Standard error of a mean of 200 coin flips: 0.5 / sqrt(200).
    assert apart["a"].std() == pytest.approx(0.03536, rel=0.06)


def test_a_ratio_of_the_same_samples_varies_less_than_its_parts() -> None:
    reference = _scores({"general": [float(index % 2) for index in range(200)], "video": [1.0] * 200})
    half = _scores({"general": [float(index % 4 == 1) for index in range(200)], "video": [1.0] * 200})
    interval = retention(half, reference)
    assert interval.value == pytest.approx(100 * (0.5 + 1) / 2)
    # 100 of the samples tell; half of them are kept, so the ratio's standard error is sqrt(0.25 / 100) (scenes of two samples hold one each).
    assert interval.high - interval.low == pytest.approx(100 * 2 * 1.96 * 0.05 / 2, rel=0.1)


def test_overall_is_the_mean_of_the_families_whatever_their_sizes() -> None:
    scores = _scores({"general": [1.0] * 9 + [0.0], "video": [0.0, 1.0]})
    assert overall(scores).value == pytest.approx((0.9 + 0.5) / 2)
    assert overall(scores).n == 12
    assert family_scores(scores)["general"].value == pytest.approx(0.9)


def test_retention_is_the_mean_of_the_families_ratios() -> None:
    reference = _scores({"general": [1.0, 1.0, 1.0, 1.0], "video": [1.0, 1.0, 0.0, 0.0]})
    scores = _scores({"general": [1.0, 1.0, 1.0, 0.0], "video": [1.0, 0.0, 0.0, 0.0]})
    assert retention(scores, reference).value == pytest.approx(100 * (0.75 + 0.5) / 2)
    assert retention(reference, reference)[:3] == pytest.approx((100, 100, 100))


def test_a_family_without_a_reference_score_has_no_retention() -> None:
    assert math.isnan(retention(_scores({"video": [1.0]}), _scores({"video": [0.0]})).value)


def test_unscored_answers_are_counted_and_in_no_mean() -> None:
    scores = _scores({"general": [1.0, math.nan, 0.0]})
    assert unscored(scores) == 1
    # One family only, as in NLVR: reported by task.
    assert family_scores(scores)["general-task"][0::3] == (0.5, 2)


def test_a_frontier_survives_json() -> None:
    scores = _scores({"general": [1.0, 0.0], "video": [1.0, 1.0]})
    frontier = Frontier((frontier_point("parcel", 64, scores, scores), frontier_point("blind", 0, scores, None)), reference="vanilla")
    assert Frontier.from_dict(frontier.to_dict()) == frontier
