"""MMMU: scores computed by hand from its rules."""

import pytest

from parcelray.benchmarks.metrics import metric


@pytest.mark.parametrize(
    ("answer", "prediction", "value"),
    [
        ("B", "B", 1), ("B", "(B)", 1), ("B", "blue dog", 1), ("B", "C", 0), ("B", "none of them", 0),
    ],
)  # fmt: skip
def test_a_choice_is_parsed_by_rule(make_sample, answer: str, prediction: str, value: float) -> None:
    sample = make_sample(answer, choices=["red cat", "blue dog", "green bird"])
    assert metric("mmmu")([prediction], [sample]).values == (value,)


@pytest.mark.parametrize(
    ("answer", "prediction", "value"),
    [
        ("3.14", "The area is 3.141 square metres", 1), ("3.14", "3.2", 0), ("1,000", "about 1000 people", 1),
        ("-2", "-2.00", 1), ("2", "12", 0), ("['mitosis', 'cell division']", "It is Cell Division.", 1),
        ("['mitosis', 'cell division']", "meiosis", 0), ("Paris", "paris, I think", 1), ("['2', '3.5']", "3.50", 1),
        ("[broken", "[broken", 1),
    ],
)  # fmt: skip
def test_an_open_prediction_must_contain_a_correct_answer(
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
