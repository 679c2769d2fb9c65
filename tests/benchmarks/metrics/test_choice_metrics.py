"""Multiple-choice metrics: which option a prediction names, computed by hand from each tool's rule."""

import pytest

from parcelray.benchmarks.metrics import metric
from parcelray.benchmarks.metrics.multiple_choice import (
    read_first_character,
    read_llava_sqa,
    read_lmms_eval_sqa,
    read_option,
    read_paligemma_sqa,
)
from parcelray.errors import UserError

_CHOICES = ["red cat", "blue dog", "green bird"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("b", "B"), ("(B)", "B"), ("B.", "B"), ("B. blue dog", "B"), ("The answer is C.", "C"),
        ("It is a Blue dog", "B"), ("A red cat", "A"), ("A man walks with a blue dog", "B"), ("A or B", None),
        ("a red cat and a blue dog", None), ("D", None), ("", None), ("neither", None),
    ],
)  # fmt: skip
def test_option_by_letter_then_by_text(text: str, letter: str | None) -> None:
    assert read_option(text, _CHOICES) == letter


@pytest.mark.parametrize(
    ("text", "llava", "lmms_eval", "first", "paligemma"),
    [
        ("B", "B", "B", "B", None),
        ("b", None, "B", None, None),
        ("B. blue dog", "B", "B", "B", None),
        ("B.", None, "B", "B", None),
        ("The answer is B.", "B", None, None, "B"),
        ("the answer is b. Sure", None, None, None, "B"),
        ("The answer is B. The answer is C.", None, None, None, "B"),
        ("Blue dog", None, None, "B", None),
        (" B", None, None, "B", None),
        ("E", None, None, None, None),
        ("", None, None, None, None),
    ],
)
def test_parsers_of_other_tools(
    text: str, llava: str | None, lmms_eval: str | None, first: str | None, paligemma: str | None
) -> None:
    assert read_llava_sqa(text, _CHOICES) == llava
    assert read_lmms_eval_sqa(text, _CHOICES) == lmms_eval
    assert read_first_character(text, _CHOICES) == first
    assert read_paligemma_sqa(text, _CHOICES) == paligemma


def test_an_unparsed_prediction_is_wrong_and_counted(make_sample) -> None:
    samples = [make_sample("B", choices=_CHOICES)] * 4
    result = metric("multiple_choice")(["B", "C", "no idea", ""], samples)
    assert result.values == (1, 0, 0, 0)
    assert result.unparsed == 2
    assert all(metric("multiple_choice")(["no idea"] * 4, samples).values == (0, 0, 0, 0) for _ in range(5))


def test_the_answer_may_be_a_letter_a_text_or_a_sentence(make_sample) -> None:
    for answer in ("B", "blue dog", "The answer is B."):
        assert metric("multiple_choice")(["B"], [make_sample(answer, choices=_CHOICES)]).values == (1,)
    with pytest.raises(UserError, match="choices"):
        metric("multiple_choice")(["B"], [make_sample("B")])


def _rotations(make_sample):
    # Question 7 in three rotations, question 8 in two.
    rows = [(7, "A"), (1_000_007, "B"), (2_000_007, "C"), (8, "A"), (1_000_008, "B")]
    return [
        make_sample(answer, id=str(index), index=index, choices=_CHOICES, category="x" if index % 10 == 7 else "y")
        for index, answer in rows
    ]


def test_an_mmbench_question_is_correct_only_in_every_rotation(make_sample) -> None:
    samples = _rotations(make_sample)
    result = metric("mmbench")(["A", "B", "A", "A", "B"], samples)
    # Question 7 is wrong in one rotation, question 8 is correct: 1/2. Rows: 4/5.
    assert result.totals == {"mmbench": 0.5, "rows": 0.8, "category/x": 0.0, "category/y": 1.0}
    assert metric("mmbench:vanilla")(["A", "B", "A", "A", "B"], samples).totals["mmbench"] == 1
    assert metric("mmbench")(["?", "B", "C", "A", "B"], samples).unparsed == 1
