"""Paired comparison of two models on the same samples."""

import pytest

from parcelray.datasets.sample import Sample
from parcelray.errors import UserError
from parcelray.evaluation.scoring.paired import compare
from parcelray.evaluation.scoring.split_scores import GivenAnswer, ScoringRules, SplitScores, score_splits


def _split(
    right: list[bool],
    metric: str = "exact_match",
    budget: int = 16,
    first: int = 0,
    whole: bool = True,
    scene_size: int = 1,
) -> SplitScores:
    samples = [
        Sample(
            str(first + number),
            "b",
            "f",
            "t",
            (),
            "?",
            ("yes",),
            metric=metric,
            scene=str((first + number) // scene_size),
            metadata={"category": "random"},
        )
        for number in range(len(right))
    ]
    answers = {budget: [GivenAnswer("yes" if each else "no") for each in right]}
    return score_splits(samples, answers, ScoringRules(whole=whole))[0]


def test_the_difference_is_paired() -> None:
    first = _split([number % 2 == 0 for number in range(200)])
    second = _split([number % 2 == 0 and number % 20 != 0 for number in range(200)], budget=64)
    found = compare(first, 16, second, 64)
    assert found.difference.value == pytest.approx(5)
    assert found.difference.low > 0
    assert found.p_value < 0.05
    assert (found.first_better, found.second_better) == (10, 0)
    assert found.n == 200


def test_samples_of_one_scene_are_not_independent() -> None:
    # Four scenes of six samples in which only the first is right, one in which only the second is. McNemar's test,
    # which takes 24 to 6 pairs as independent, gives p = 0.001; five scenes of twenty prove little.
    first = [number // 6 < 4 or number // 6 > 4 for number in range(120)]
    second = [number // 6 >= 4 for number in range(120)]
    found = compare(_split(first, scene_size=6), 16, _split(second, scene_size=6), 16)
    assert found.difference.value == pytest.approx(100 * (24 - 6) / 120)
    assert found.difference.low < 0 < found.difference.high
    assert 0.1 < found.p_value < 0.4


def test_a_model_does_not_differ_from_itself() -> None:
    split = _split([True, False] * 10)
    assert compare(split, 16, split, 16)[4:6] == ((0, 0, 0, 20), 1)
    # Two models that are right on the same samples, but give other wrong answers, may differ on further samples.
    wrong = [GivenAnswer("yes" if number % 2 == 0 else f"{number}") for number in range(20)]
    other = score_splits(split.samples, {16: wrong})[0]
    found = compare(split, 16, other, 16)
    assert (found.difference.value, found.p_value) == (0, 1)
    assert found.difference.low == pytest.approx(-13.45, abs=0.01)


def test_only_samples_that_both_have_are_compared() -> None:
    found = compare(_split([True] * 10 + [False] * 10), 16, _split([True] * 20, first=10), 16)
    assert found.n == 10
    assert (found.first.value, found.second.value) == (0, 100)
    with pytest.raises(UserError, match="no sample of b in common"):
        compare(_split([True]), 16, _split([True], first=5), 16)


def test_scores_of_a_whole_split_are_not_compared_on_a_part() -> None:
    with pytest.raises(UserError, match="is defined on the whole split"):
        compare(_split([True] * 10, "pope"), 16, _split([True] * 9, "pope"), 16)
    with pytest.raises(UserError, match="is defined on the whole split"):
        compare(_split([True] * 10, "pope", whole=False), 16, _split([True] * 10, "pope", whole=False), 16)
    assert compare(_split([True] * 10, "pope"), 16, _split([True] * 10, "pope"), 16).difference.value == 0


def test_different_metrics_are_not_compared() -> None:
    with pytest.raises(
        UserError, match="scored by exact_match:lenient in the first evaluation and by anls:paper in the second"
    ):
        compare(_split([True]), 16, _split([True], "anls"), 16)
