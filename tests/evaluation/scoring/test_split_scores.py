"""Scores of samples and of splits at every budget, and intervals that respect dependent samples."""

import math
import random

import numpy as np
import pytest

from parcelray.datasets.sample import Sample
from parcelray.errors import UserError
from parcelray.evaluation.scoring.estimate import difference
from parcelray.evaluation.scoring.split_scores import (
    GivenAnswer,
    ScoringRules,
    SplitScores,
    by_metric,
    score,
    score_splits,
)


def _sample(number: int, metric: str, *answers: str, scene: str = "", **metadata: object) -> Sample:
    return Sample(
        str(number), "b", "f", "t", (), "?", answers, metric=metric, scene=scene or str(number), metadata=metadata
    )


def _one(samples: list[Sample], texts: list[str], **rules: object) -> SplitScores:
    (split,) = score_splits(samples, {16: [GivenAnswer(text) for text in texts]}, ScoringRules(**rules))  # type: ignore[arg-type]
    return split


def test_a_mean_has_the_bootstraps_width_and_the_papers_scale() -> None:
    samples = [_sample(number, "exact_match", "x") for number in range(400)]
    score = _one(samples, ["x" if number % 2 else "y" for number in range(400)]).scores[16]
    assert score.estimate.value == 50
    assert score.totals["exact_match"] == 50
    assert score.estimate.std_error == pytest.approx(100 * 0.5 / 20, rel=0.06)
    assert score.estimate.interval.n == 400


def test_irregular_answers_are_counted_by_kind() -> None:
    samples = [_sample(number, "counting", "2") for number in range(4)] + [_sample(4, "counting")]
    answers = [
        GivenAnswer("two", num_new_tokens=2),
        GivenAnswer("some", num_new_tokens=2),
        GivenAnswer(" "),
        GivenAnswer("2 2 2", True, 8),
        GivenAnswer("2"),
    ]
    (split,) = score_splits(samples, {16: answers})
    score = split.scores[16]
    assert (score.unscored, score.empty, score.cut_off, score.mean_new_tokens) == (1, 1, 1, 12 / 5)
    assert score.unparsed >= 1
    assert score.estimate.n == 4


def test_a_mixed_split_is_the_mean_of_its_values() -> None:
    samples = [
        _sample(0, "exact_match", "x"),
        _sample(1, "exact_match", "x"),
        _sample(2, "box_iou", "<loc0000><loc0000><loc0512><loc0512>"),
    ]
    split = _one(samples, ["x", "y", "<loc0000><loc0000><loc0512><loc0512>"])
    assert split.metric == "exact_match:lenient + box_iou:at_50"
    assert split.scores[16].estimate.value == pytest.approx(200 / 3)


def test_a_mean_over_languages_weighs_them_equally() -> None:
    samples = [_sample(number, "exact_match", "x", language="de" if number < 3 else "zh") for number in range(4)]
    score = _one(samples, ["x", "x", "y", "y"], average_over="language").scores[16]
    assert score.estimate.value == pytest.approx((200 / 3 + 0) / 2)
    assert [score.totals["language/de"], score.totals["language/zh"]] == pytest.approx([200 / 3, 0])


def test_another_metric_can_score_the_same_answers() -> None:
    samples = [_sample(0, "exact_match", "tower")]
    assert _one(samples, ["towers"]).scores[16].estimate.value == 0
    split = _one(samples, ["towers"], metric="anls:paper")
    assert split.metric == "anls:paper"
    assert split.scores[16].estimate.value == pytest.approx(100 * (1 - 1 / 6))


def test_the_draws_of_two_budgets_are_paired() -> None:
    samples = [_sample(number, "exact_match", "x") for number in range(300)]
    rng = random.Random(0)
    first = ["x" if rng.random() < 0.5 else "y" for _ in samples]
    second = [text if number % 10 else "x" for number, text in enumerate(first)]
    (split,) = score_splits(
        samples, {16: [GivenAnswer(text) for text in first], 64: [GivenAnswer(text) for text in second]}
    )
    gap = difference(split.scores[64].estimate, split.scores[16].estimate)
    # 30 samples were set to correct, and about half of them were wrong: the gap is about 5 points with an error of
    # 1.3, not of 4.
    assert 2 < gap.value < 8
    assert gap.std_error < 2


def _pope(answers: list[str]) -> SplitScores:
    samples = [
        _sample(number, "pope", "yes" if number % 2 else "no", category="random") for number in range(len(answers))
    ]
    return _one(samples, answers)


def test_f1_has_the_jackknifes_error() -> None:
    rng = random.Random(1)
    answers = [
        ("yes" if number % 2 else "no") if rng.random() < 0.8 else ("no" if number % 2 else "yes")
        for number in range(600)
    ]
    split = _pope(answers)
    assert not split.additive
    score = split.scores[16]
    # Delta method for F1 = 2TP / (2TP + FP + FN), the three counts multinomial.
    tp = sum(answer == "yes" and number % 2 == 1 for number, answer in enumerate(answers)) / 600
    wrong = sum((answer == "yes") != (number % 2 == 1) for number, answer in enumerate(answers)) / 600
    assert score.estimate.value == pytest.approx(100 * 2 * tp / (2 * tp + wrong))
    gradient = np.array([2 * wrong / (2 * tp + wrong) ** 2, -2 * tp / (2 * tp + wrong) ** 2])
    covariance = np.array([[tp * (1 - tp), -tp * wrong], [-tp * wrong, wrong * (1 - wrong)]]) / 600
    assert score.estimate.std_error == pytest.approx(100 * math.sqrt(gradient @ covariance @ gradient), rel=0.25)


def test_mme_keeps_its_pairs_together() -> None:
    samples = [
        _sample(
            2 * image + question,
            "mme",
            "yes" if question else "no",
            scene=str(image),
            category="existence",
            image_id=str(image),
        )
        for image in range(40)
        for question in range(2)
    ]
    score = _one(samples, ["yes" for _ in samples]).scores[16]
    # Every image has one of two right: accuracy 50, accuracy+ 0.
    assert (score.estimate.value, score.totals["accuracy_plus"]) == (50, 0)
    assert score.estimate.std_error == pytest.approx(0, abs=1e-6)


def test_cider_is_the_mean_of_its_values_with_the_whole_sets_frequencies() -> None:
    captions = [
        "a red cat on a mat",
        "two birds in the sky",
        "a dog runs",
        "a man with a hat",
        "the sea at night",
        "a green tree",
    ]
    samples = [_sample(number, "cider", caption) for number, caption in enumerate(captions)]
    score = _one(samples, [*captions[:4], "nothing at all", "x"]).scores[16]
    assert score.estimate.value == pytest.approx(100 * float(np.mean(score.values)))
    assert score.estimate.std_error > 0


def test_splits_of_one_benchmark_are_scored_separately() -> None:
    samples = [_sample(number, "exact_match", "x") for number in range(4)]
    found = score_splits(
        samples,
        {0: [GivenAnswer("x")] * 4},
        ScoringRules(split_of=lambda sample: f"b/{int(sample.id) % 2}", problems=3, whole=False),
    )
    assert [(split.name, len(split.samples), split.rules.problems, split.rules.whole) for split in found] == [
        ("b/0", 2, 3, False),
        ("b/1", 2, 3, False),
    ]


def test_each_metric_scores_its_own_samples_and_the_order_is_kept() -> None:
    samples = [
        _sample(0, "exact_match", "red"),
        _sample(1, "box_iou", "<loc0000><loc0000><loc0512><loc0512>"),
        _sample(2, "exact_match", "blue"),
        _sample(3, "exact_match"),
    ]
    predictions = ["Red.", "no box", "green", "x"]
    assert score(samples, predictions) == pytest.approx([1, 0, 0, math.nan], nan_ok=True)


def test_a_corpus_metric_scores_its_samples_together() -> None:
    samples = [_sample(0, "cider", "a red cat"), _sample(1, "exact_match", "x"), _sample(2, "cider", "two birds")]
    scores = score(samples, ["a red cat", "x", "two birds"])
    # Each caption equals its reference: orders 1 to 3 of 4, and 1 to 2 of 4, are matched. Alone, every idf would be log
    # 1 = 0.
    assert [scores[0], scores[2]] == pytest.approx([7.5, 5])
    assert score(samples[:1], ["a red cat"]) == [0]


def test_unparsed_answers_are_counted_by_metric() -> None:
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


def test_an_unknown_metric_and_a_missing_prediction_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'exact_match'"):
        score([_sample(0, "exact_mach", "x")], ["x"])
    with pytest.raises(ValueError, match="1 predictions for 2 samples"):
        score([_sample(0, "exact_match", "x")] * 2, ["x"])
