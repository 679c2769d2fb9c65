"""Frontier points, means over splits, and retention, against numbers computed by hand."""

import math

import pytest

from parcelray.datasets.sample import Sample
from parcelray.evaluation.scoring.aggregate import frontier_point, retentions
from parcelray.evaluation.scoring.estimate import mean_of
from parcelray.evaluation.scoring.split_scores import GivenAnswer, ScoringRules, SplitScores, score_splits


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
    # The reference is correct on 100 samples, one per scene, and half of them stay correct. So the ratio's standard
    # error is sqrt(0.25 / 100).
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


def test_unscored_answers_are_counted_and_left_out_of_means() -> None:
    point = frontier_point("m", 64, _splits({"general": [1.0, math.nan, 0.0]}), None)
    assert point.unscored == 1
    assert (point.families["general"].value, point.families["general"].n) == (50, 2)
