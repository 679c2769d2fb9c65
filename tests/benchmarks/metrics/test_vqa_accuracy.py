"""VQA accuracy and its text normalisation: scores computed by hand from visualqa.org/evaluation.html."""

import math

import pytest

from parcelray.benchmarks.metrics import metric
from parcelray.benchmarks.metrics.vqa_accuracy import m4c_pre_step, normalize


def _value(name, prediction, sample):
    return metric(name)([prediction], [sample]).values[0]


@pytest.mark.parametrize(
    ("matches", "leave_one_out", "simple"),
    # n of 10 annotators agree. Leave-one-out: (n min((n-1)/3, 1) + (10-n) min(n/3, 1)) / 10.
    [(0, 0, 0), (1, 0.3, 1 / 3), (2, 0.6, 2 / 3), (3, 0.9, 1), (4, 1, 1), (10, 1, 1)],
)
def test_accuracy_by_number_of_matching_annotators(
    make_sample, matches: int, leave_one_out: float, simple: float
) -> None:
    sample = make_sample(*["cat"] * matches, *[f"other {number}" for number in range(10 - matches)])
    for variant in ("leave_one_out", "always_normalized", "m4c"):
        assert _value(f"vqa_accuracy:{variant}", "cat", sample) == pytest.approx(leave_one_out)
    for variant in ("simple", "big_vision"):
        assert _value(f"vqa_accuracy:{variant}", "cat", sample) == pytest.approx(simple)


def test_fewer_than_ten_answers(make_sample) -> None:
    # Two of three agree: (1/3 + 1/3 + 2/3) / 3 = 4/9.
    assert _value("vqa_accuracy", "cat", make_sample("cat", "cat", "dog")) == pytest.approx(4 / 9)
    # Leave-one-out is undefined for a single answer; big_vision compares by equality.
    assert math.isnan(_value("vqa_accuracy", "cat", make_sample("cat")))
    assert _value("vqa_accuracy:big_vision", "cat", make_sample("cat")) == 1
    assert _value("vqa_accuracy:big_vision", "Cat", make_sample("cat")) == 0


def test_text_is_normalised_only_if_annotators_disagree(make_sample) -> None:
    unanimous, divided = make_sample(*["Yes"] * 10), make_sample(*["Yes"] * 9, "no")
    assert _value("vqa_accuracy", "yes", unanimous) == 0
    assert _value("vqa_accuracy", "Yes\n", unanimous) == 1
    assert _value("vqa_accuracy", "yes", divided) == 1
    assert _value("vqa_accuracy:always_normalized", "yes", unanimous) == 1
    assert _value("vqa_accuracy:big_vision", "yes", divided) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat", "cat"),
        ("none", "0"),
        ("ten dogs", "10 dogs"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),  # two apostrophes are missing
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),  # an error in the official table
        ("red/blue", "red blue"),
        ("red, blue", "red blue"),
        ("red,blue", "red blue"),
        ("1,000", "1000"),
        ("1,000/x", "1000x"),  # a comma in a number deletes all marks
        ("3.5", "3.5"),
        ("3.", "3"),
        ("st. john", "st john"),
        ("10:30", "10:30"),  # the colon is not a removed mark
        ("A", ""),
    ],
)
def test_normalisation(text: str, expected: str) -> None:
    assert normalize(text) == expected


def test_pre_step_of_evalai() -> None:
    assert m4c_pre_step(" John's, why? ") == "john 's why"


@pytest.mark.parametrize("text", ["The DOG, a cat?", "Dont stop at 1,000!", "TWO men/women"])
def test_case_does_not_matter_after_normalisation(text: str) -> None:
    assert normalize(text) == normalize(text.lower()) == normalize(text.upper())


def test_sub_scores_by_answer_type(make_sample) -> None:
    samples = [make_sample(*["yes"] * 10, answer_type="yes/no"), make_sample(*["2"] * 10, answer_type="number")]
    result = metric("vqa_accuracy")(["yes", "3"], samples)
    assert result.totals == {"vqa_accuracy": 0.5, "answer_type/number": 0.0, "answer_type/yes/no": 1.0}


def test_vizwiz_reports_unanswerable_separately(make_sample) -> None:
    samples = [
        make_sample(*["unanswerable"] * 8, "cup", "mug"),
        make_sample(*["cup"] * 9, "unanswerable"),
        make_sample(*["pen"] * 10),
    ]
    result = metric("vizwiz")(["Unanswerable", "unanswerable", "pen."], samples)
    # 8 agree: 1. One agrees: 0.3. All agree: 1.
    assert result.values == pytest.approx((1, 0.3, 1))
    assert result.totals == pytest.approx({"vizwiz": 2.3 / 3, "answerable": 0.65, "unanswerable_rate": 2 / 3})
    # Empty human answers are dropped; the remaining one is compared by equality.
    assert metric("vizwiz:big_vision")(["pen"], [make_sample("", "pen", "")]).values == (1,)
