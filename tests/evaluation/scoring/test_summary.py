"""The needed budget, the oracle, and the most sensitive splits, against numbers computed by hand."""

import math

import pytest

from parcelray.datasets.sample import Sample
from parcelray.evaluation.scoring.split_scores import GivenAnswer, SplitScores, score_splits
from parcelray.evaluation.scoring.summary import most_sensitive, needed_budget, oracle_curve


def _split(marks: dict[int, str], metric: str = "exact_match") -> SplitScores:
    """A split with correct (`1`) and wrong (`0`) answers, one mark per sample, by budget."""
    count = len(next(iter(marks.values())))
    samples = [
        Sample(str(number), "b", "f", "t", (), "?", ("yes",), metric=metric, scene=str(number))
        for number in range(count)
    ]
    return score_splits(
        samples,
        {budget: [GivenAnswer("yes" if mark == "1" else "no") for mark in row] for budget, row in marks.items()},
    )[0]


def test_the_needed_budget_is_the_smallest_within_the_tolerance() -> None:
    scores = {0: 20.0, 16: 57.0, 64: 57.1, 256: 60.0}
    assert needed_budget(scores, 256, 5) == 16
    assert needed_budget(scores, 256, 4.9) == 64
    assert needed_budget(scores, 256, 0) == 256
    assert needed_budget(scores, 256, 100) == 0
    assert needed_budget({16: 1.0, 256: 0.0}, 256, 5) is None
    assert needed_budget({16: 1.0}, 256, 5) is None


def test_the_oracle_chooses_the_smallest_budget_with_the_best_answer() -> None:
    # The last sample is wrong at every budget, the third is correct only at 16.
    curve = oracle_curve(_split({0: "1111", 16: "0110", 64: "1100", 256: "1100"}))
    assert [(point.cap, point.score) for point in curve] == [(16, 50), (64, 75), (256, 75)]
    # Sample 0 needs 64, samples 1 and 2 are correct at 16, sample 3 gets the smallest budget.
    assert [point.mean_tokens for point in curve] == [16, (64 + 3 * 16) / 4, (64 + 3 * 16) / 4]


def test_a_score_of_the_whole_set_has_no_oracle() -> None:
    assert oracle_curve(_split({16: "10"}, "pope")) == []
    assert oracle_curve(_split({0: "10"})) == []


def test_the_most_sensitive_lose_most() -> None:
    assert most_sensitive({"a": 90.0, "b": 50.0, "c": math.nan, "d": 70.0, "e": 60.0}) == ["b", "e", "d"]


def test_the_oracle_is_on_the_papers_scale() -> None:
    assert oracle_curve(_split({16: "11"}))[0].score == pytest.approx(100)
