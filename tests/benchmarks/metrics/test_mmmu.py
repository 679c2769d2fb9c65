"""MMMU: scores computed by hand from its rules."""

import pytest

from parcelray.benchmarks.metrics import metric
from parcelray.benchmarks.metrics.mmmu import read_mmmu
from parcelray.benchmarks.metrics.multiple_choice import options


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("B", "B"), ("(B)", "B"), ("B.", "B"), ("'B'!", "B"), ("The answer is B", "B"), ("The answer is B.", "B"),
        ("A or rather C", "C"), ("(A) or (C)? (A)", "A"), ("(B), not A", "B"), ("A, not C", "C"),
        # Behind a letter must be a space or the end, and the marks at the ends are stripped once, in a fixed order.
        ("B: the blue dog", None), ("B. The", None), ("(B", None), ("b", None), ("ABC", None), ("", None),
        # Texts of options count in predictions of more than five words only, and again the last one wins.
        ("blue dog", None), ("there one can see a Blue Dog", "B"),
        ("there is no blue dog but a green bird", "C"), ("none of them is to be seen", None),
    ],
)  # fmt: skip
def test_a_choice_is_parsed_by_the_official_rule(make_sample, prediction: str, letter: str | None) -> None:
    choices = ["red cat", "blue dog", "green bird"]
    assert read_mmmu(prediction, options(choices)) == letter
    result = metric("mmmu")([prediction], [make_sample("B", choices=choices)])
    assert result.values == (letter == "B",)
    assert result.unparsed == (letter is None)


@pytest.mark.parametrize(
    ("answer", "prediction", "value"),
    [
        ("3.14", "The area is 3.141 square metres", 1), ("3.14", "3.2", 0), ("1,000", "about 1000 people", 1),
        ("-2", "-2.00", 1), ("2", "12", 0), ("['mitosis', 'cell division']", "It is Cell Division.", 1),
        ("['mitosis', 'cell division']", "meiosis", 0), ("Paris", "paris, I think", 1), ("['2', '3.5']", "3.50", 1),
        ("[broken", "[broken", 1), ("5", "The value is 15", 0), ("5", ".5", 0), ("0.5", ".5", 1), ("5", "..5", 0),
        ("5", "5.", 1), ("1000", "it is 1,000", 1), ("1000", "1e3", 1),
        # Only the shortest tail behind an indicator counts.
        ("red", "Red things are blue", 1), ("red", "Red things, so the answer is blue", 0),
        ("4", "4 and 6 make 10, so it is 10", 0), ("10", "4 + 6 = 10", 1), ("4", "4 + 6 = 10", 0),
        ("4", "4 = 4\nfinal answer 7", 0), ("8", "the result 8\nthat could be 9", 1),
        # A single character needs a space in front of it or behind it.
        ("a", "banana", 0), ("c", "c", 1), ("c", "vitamin c", 1), ("c", "the answer is abc", 0),
        ("red", "the answer is :", 0), ("red", "", 0),
    ],
)  # fmt: skip
def test_an_open_prediction_is_searched_in_its_key_parts(
    make_sample, answer: str, prediction: str, value: float
) -> None:
    assert metric("mmmu")([prediction], [make_sample(answer, choices=[])]).values == (value,)


def test_multiple_choice_and_open_questions_have_sub_scores(make_sample) -> None:
    samples = [
        make_sample("A", choices=["x", "y"], category="Art"),
        make_sample("7", choices=[], category="Music"),
        make_sample(choices=[]),
    ]
    result = metric("mmmu")(["B", "7", "x"], samples)
    assert result.totals["mmmu"] == 0.5
    assert (result.totals["multiple_choice"], result.totals["open"], result.totals["category/Art"]) == (0, 1, 0)
