"""Scores by each sample's metric."""

import math

import pytest

from parcelray.datasets.sample import Sample
from parcelray.errors import UserError
from parcelray.evaluation.scoring.score import by_metric, score


def _sample(number: int, metric: str, *answers: str) -> Sample:
    return Sample(
        id=str(number),
        benchmark="b",
        family="f",
        task="t",
        images=(),
        prompt="?",
        answers=answers,
        metric=metric,
        scene=f"s{number}",
    )


def test_each_metric_scores_its_own_samples_and_the_order_is_kept() -> None:
    samples = [
        _sample(0, "exact_match", "red"),
        _sample(1, "box_iou", "<loc0000><loc0000><loc0512><loc0512>"),
        _sample(2, "exact_match", "blue"),
        _sample(3, "exact_match"),
    ]
    predictions = ["Red.", "no box", "green", "x"]
    scores = score(samples, predictions, num_visual_tokens=16)
    assert [(each.sample_id, each.scene, each.prediction, each.num_visual_tokens) for each in scores] == [
        (sample.id, sample.scene, prediction, 16) for sample, prediction in zip(samples, predictions, strict=True)
    ]
    assert [each.value for each in scores] == pytest.approx([1, 0, 0, math.nan], nan_ok=True)


def test_a_corpus_metric_sees_its_samples_together() -> None:
    samples = [_sample(0, "cider", "a red cat"), _sample(1, "exact_match", "x"), _sample(2, "cider", "two birds")]
    scores = score(samples, ["a red cat", "x", "two birds"], num_visual_tokens=16)
    # Each caption equals its reference: orders 1 to 3 of 4, and 1 to 2 of 4, are matched. Alone, every idf would be log
    # 1 = 0.
    assert [scores[0].value, scores[2].value] == pytest.approx([7.5, 5])
    assert score(samples[:1], ["a red cat"], num_visual_tokens=16)[0].value == 0


def test_unread_answers_are_counted_by_metric() -> None:
    samples = [
        _sample(0, "counting", "2"),
        _sample(1, "counting", "3"),
        _sample(2, "box_iou", "<loc0000><loc0000><loc0512><loc0512>"),
    ]
    results = by_metric(samples, ["two", "some", "left"], None)
    assert {name: (result.totals[name], result.unparsed) for name, (_, result) in results.items()} == {
        "counting": (0.5, 1),
        "box_iou": (0, 1),
    }


def test_an_unknown_metric_and_a_missing_answer_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'exact_match'"):
        score([_sample(0, "exact_mach", "x")], ["x"], num_visual_tokens=16)
    with pytest.raises(ValueError, match="1 predictions for 2 samples"):
        score([_sample(0, "exact_match", "x")] * 2, ["x"], num_visual_tokens=16)
