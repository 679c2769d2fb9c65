"""MME, POPE and NLVR2: scores computed by hand from their rules."""

import pytest

from parcelray.benchmarks.metrics import metric
from parcelray.benchmarks.metrics.mme import read_yes_no
from parcelray.benchmarks.metrics.pope import read_official
from parcelray.errors import UserError


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes", "yes"),
        (" no.", "no"),
        ("Y", "yes"),
        ("n.", "no"),
        ("x", None),
        ("Yes, it is", "yes"),
        ("Not", "no"),
        ("It is yes", None),
        ("", None),
    ],
)
def test_yes_no_parsing_of_mme(text: str, answer: str | None) -> None:
    assert read_yes_no(text) == answer


def _mme(make_sample):
    images = [("existence", "1"), ("existence", "2"), ("OCR", "1"), ("code_reasoning", "9")]
    return [
        make_sample(answer, category=category, image_id=image) for category, image in images for answer in ("yes", "no")
    ]


def test_mme_points(make_sample) -> None:
    result = metric("mme")(["yes", "no", "yes", "yes", "Yes.", "No.", "hm", "no"], _mme(make_sample))
    assert result.values == (1, 1, 1, 0, 1, 1, 0, 1)
    assert result.unparsed == 1
    assert result.totals == pytest.approx(
        {
            "mme": 375,
            "accuracy": 0.75,  # 6 of 8 questions
            "accuracy_plus": 0.5,  # 2 of 4 images
            "perception": 325,
            "perception/existence": 125,  # 3 of 4 questions: 75, 1 of 2 images: 50
            "perception/OCR": 200,
            "cognition": 50,
            "cognition/code_reasoning": 50,  # 1 of 2 questions: 50, no image: 0
            "incomplete_images": 0,
        }
    )


def test_an_image_with_a_missing_question_is_left_out_and_counted(make_sample) -> None:
    samples = _mme(make_sample)[:5]
    result = metric("mme")(["yes", "no", "yes", "no", "yes"], samples)
    assert result.totals["mme"] == 200
    assert result.totals["incomplete_images"] == 1
    with pytest.raises(UserError, match="no subtask 'weather'"):
        metric("mme")(["yes"], [make_sample("yes", category="weather", image_id="1")])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes", "yes"),
        ("No, there is none", "no"),
        ("There is not", "no"),
        ("Yes. No", "yes"),
        ("NO", "yes"),
        ("", "yes"),
        ("no.", "no"),
        ("nothing", "yes"),
    ],
)
def test_official_parsing_of_pope(text: str, answer: str) -> None:
    assert read_official(text) == answer


def test_pope_scores(make_sample) -> None:
    samples = [make_sample(answer) for answer in ("yes", "yes", "yes", "no", "no", "no", "no", "no")]
    predictions = ["yes", "yes", "no", "yes", "no", "no", "no", "no"]
    for variant in ("official", "whole_output"):
        totals = metric(f"pope:{variant}")(predictions, samples).totals
        # TP 2, FP 1, FN 1, TN 4: accuracy 6/8, P = R = F1 = 2/3. 3 of 8 predictions are yes, as many as answers.
        assert totals["pope"] == totals["f1"] == pytest.approx(2 / 3)
        assert (totals["accuracy"], totals["precision"], totals["recall"], totals["yes_ratio"]) == pytest.approx(
            (0.75, 2 / 3, 2 / 3, 0.375)
        )
    assert metric("pope:paligemma")(predictions, samples).totals["pope"] == 0.75


def test_yes_ratio_is_the_share_of_predictions(make_sample) -> None:
    samples = [make_sample("yes"), make_sample("no")]
    assert metric("pope")(["yes", "yes"], samples).totals["yes_ratio"] == 1
    assert metric("pope")(["no", "no"], samples).totals["yes_ratio"] == 0


def test_unparsed_predictions_of_pope(make_sample) -> None:
    samples = [make_sample("yes"), make_sample("no"), make_sample("yes")]
    official = metric("pope")(["maybe", "Yes.", "yes"], samples)
    assert official.values == (1, 0, 1)
    assert (official.unparsed, official.totals["assumed_yes"]) == (0, 1)
    whole = metric("pope:whole_output")(["maybe", "Yes.", "yes"], samples)
    # The unparsed prediction for a yes question is a false negative: TP 1, FN 1, FP 0.
    assert whole.values == (0, 0, 1)
    assert (whole.unparsed, whole.totals["recall"], whole.totals["precision"]) == (2, 0.5, 1)


def test_pope_is_the_mean_over_its_categories(make_sample) -> None:
    samples = [
        make_sample("yes", category="random"),
        make_sample("yes", category="popular"),
        make_sample("no", category="popular"),
    ]
    totals = metric("pope")(["yes", "no", "no"], samples).totals
    assert totals["category/random/f1"] == 1
    assert totals["category/popular/f1"] == 0
    assert (totals["pope"], totals["accuracy"]) == (0.5, 0.75)


@pytest.mark.parametrize(
    ("identifiers", "consistency"),
    [
        # NLVR: the sentences 7 and 12, with two sets of boxes each.
        (("7-0", "7-1", "12-0", "12-1"), 1 / 2),
        # NLVR2: the first two pairs of images share their sentence.
        (("test1-0-0-0", "test1-0-1-0", "test1-0-0-1", "test1-1-0-0"), 2 / 3),
    ],
)
def test_consistency_groups_by_sentence(make_sample, identifiers: tuple[str, ...], consistency: float) -> None:
    answers = ("true", "false", "true", "true")
    samples = [make_sample(answer, identifier=name) for answer, name in zip(answers, identifiers, strict=True)]
    totals = metric("nlvr2")(["true"] * 4, samples).totals
    assert totals == {"nlvr2": 0.75, "consistency": pytest.approx(consistency)}


def test_nlvr2(make_sample) -> None:
    samples = [
        make_sample(answer, identifier=sentence)
        for answer, sentence in (("True", "a"), ("False", "a"), ("True", "b"), ("False", "b"))
    ]
    result = metric("nlvr2")(["true", "No.", "True", "perhaps"], samples)
    assert result.values == (1, 1, 1, 0)
    assert result.unparsed == 1
    assert result.totals == {"nlvr2": 0.75, "consistency": 0.5}
    raw = metric("nlvr2:raw")(["true", "False", "True", "perhaps"], samples)
    assert raw.values == (0, 1, 1, 0)
    assert raw.unparsed == 1
