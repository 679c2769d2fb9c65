"""Paired comparison of two models on the same samples."""

import pytest
from scipy.stats import binomtest

from parcelray.datasets.sample import Sample
from parcelray.errors import UserError
from parcelray.evaluation.scoring.paired import compare, mcnemar
from parcelray.evaluation.scoring.split_scores import GivenAnswer, ScoringRules, SplitScores, score_splits


def _split(
    right: list[bool], metric: str = "exact_match", budget: int = 16, first: int = 0, whole: bool = True
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
            scene=str(first + number),
            metadata={"category": "random"},
        )
        for number in range(len(right))
    ]
    answers = {budget: [GivenAnswer("yes" if each else "no") for each in right]}
    return score_splits(samples, answers, ScoringRules(whole=whole))[0]


def test_mcnemar_is_the_exact_test_of_the_discordant_pairs() -> None:
    first = [1.0] * 9 + [0.0] * 2 + [1.0] * 20
    second = [0.0] * 9 + [1.0] * 2 + [1.0] * 20
    found = mcnemar(first, second)
    assert found is not None
    assert found[:2] == (9, 2)
    # Two-sided exact binomial of 9 in 11: 2 x (55 + 11 + 1) / 2048.
    assert found.p_value == pytest.approx(2 * 67 / 2048)
    assert found.p_value == pytest.approx(binomtest(9, 11).pvalue)
    assert mcnemar([1.0], [1.0]) == (0, 0, 1.0)
    assert mcnemar([0.5], [1.0]) is None


def test_the_difference_is_paired() -> None:
    first = _split([number % 2 == 0 for number in range(200)])
    second = _split([number % 2 == 0 and number % 20 != 0 for number in range(200)], budget=64)
    found = compare(first, 16, second, 64)
    assert found.difference.value == pytest.approx(5)
    assert found.difference.low > 0
    assert found.p_value < 0.05
    assert found.mcnemar is not None
    assert found.mcnemar[:2] == (10, 0)
    assert found.n == 200


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
