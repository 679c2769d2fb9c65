"""Scores, intervals and retention, against numbers computed by hand."""

import math

import numpy as np
import pytest

from parcelray.datasets.sample import Sample
from parcelray.evaluation.scoring.aggregate import Frontier, frontier_point, mean_of, retentions
from parcelray.evaluation.scoring.intervals import bootstrap_difference, bootstrap_mean, cluster_draws, wilson
from parcelray.evaluation.scoring.split_scores import GivenAnswer, ScoringRules, SplitScores, score_splits


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


def _splits(values: dict[str, list[float]], budget: int = 64) -> list[SplitScores]:
    """Splits of one benchmark, two samples a scene; a NaN is a sample without an answer."""
    samples, answers = [], []
    for family, members in values.items():
        for index, value in enumerate(members):
            right = () if math.isnan(value) else ("x",)
            samples.append(
                Sample(
                    f"{family}-{index}",
                    "mini",
                    family,
                    f"{family}-task",
                    (),
                    "?",
                    right,
                    scene=f"{family}-{index // 2}",
                )
            )
            answers.append(GivenAnswer("x" if value == 1 else "y"))
    return score_splits(samples, {budget: answers}, ScoringRules(split_of=lambda sample: f"mini/{sample.family}"))


def test_a_ratio_of_the_same_samples_varies_less_than_its_parts() -> None:
    reference = _splits({"general": [float(index % 2) for index in range(200)], "video": [1.0] * 200})
    half = _splits({"general": [float(index % 4 == 1) for index in range(200)], "video": [1.0] * 200})
    interval = mean_of(list(retentions(half, 64, reference, 64).values())).interval
    assert interval.value == pytest.approx(100 * (0.5 + 1) / 2)
    # 100 of the samples tell; half of them are kept, so the ratio's standard error is sqrt(0.25 / 100) (scenes of two
    # samples hold one each).
    assert interval.high - interval.low == pytest.approx(100 * 2 * 1.96 * 0.05 / 2, rel=0.1)


def test_overall_is_the_mean_of_the_families_whatever_their_sizes() -> None:
    point = frontier_point("m", 64, _splits({"general": [1.0] * 9 + [0.0], "video": [0.0, 1.0]}), None)
    assert point.overall.value == pytest.approx(100 * (0.9 + 0.5) / 2)
    assert point.overall.n == 12
    assert point.families["general"].value == pytest.approx(90)
    assert point.retention is None


def test_retention_is_the_mean_of_the_splits_ratios() -> None:
    reference = _splits({"general": [1.0, 1.0, 1.0, 1.0], "video": [1.0, 1.0, 0.0, 0.0]})
    splits = _splits({"general": [1.0, 1.0, 1.0, 0.0], "video": [1.0, 0.0, 0.0, 0.0]}, budget=16)
    point = frontier_point("m", 16, splits, (reference, 64))
    assert point.retention is not None
    assert point.retention.value == pytest.approx(100 * (0.75 + 0.5) / 2)
    same = frontier_point("m", 64, reference, (reference, 64))
    assert same.retention is not None
    assert same.retention[:3] == pytest.approx((100, 100, 100))


def test_a_split_without_a_reference_score_has_no_retention() -> None:
    point = frontier_point("m", 64, _splits({"video": [1.0]}), (_splits({"video": [0.0]}), 64))
    assert point.retention is not None
    assert math.isnan(point.retention.value)


def test_unscored_answers_are_counted_and_in_no_mean() -> None:
    point = frontier_point("m", 64, _splits({"general": [1.0, math.nan, 0.0]}), None)
    assert point.unscored == 1
    assert (point.families["general"].value, point.families["general"].n) == (50, 2)


def test_a_frontier_survives_json() -> None:
    splits = _splits({"general": [1.0, 0.0], "video": [1.0, 1.0]})
    frontier = Frontier(
        (frontier_point("parcel", 64, splits, (splits, 64)), frontier_point("blind", 64, splits, None, shown=0)),
        reference="vanilla",
    )
    assert frontier.points[1].num_visual_tokens == 0
    assert Frontier.from_dict(frontier.to_dict()) == frontier
