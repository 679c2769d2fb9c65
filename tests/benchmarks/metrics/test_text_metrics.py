"""Metrics that compare strings and numbers: scores computed by hand from their rules."""

import itertools
import math
import random

import pytest

from parcelray.benchmarks.metrics import metric
from parcelray.benchmarks.metrics.anls import edit_distance, paper
from parcelray.benchmarks.metrics.nlvr2 import consistency
from parcelray.errors import UserError


def _value(name, prediction, sample):
    return metric(name)([prediction], [sample]).values[0]


@pytest.mark.parametrize(
    ("prediction", "answers", "value"),
    [
        ("Red", ("red",), 1),
        (" red. ", ("red",), 1),
        ("six", ("6", "six"), 1),
        ("dark  red", ("dark red",), 1),
        ("blue", ("red",), 0),
        ("", ("red",), 0),
    ],
)
def test_exact_match(make_sample, prediction: str, answers: tuple[str, ...], value: float) -> None:
    assert _value("exact_match", prediction, make_sample(*answers)) == value


@pytest.mark.parametrize(
    ("prediction", "equal_in"),
    [
        ("red", {"lenient", "raw", "lower", "lmms_eval", "vlmevalkit"}),
        ("Red", {"lenient", "lower", "lmms_eval", "vlmevalkit"}),
        (" red", {"lenient", "vlmevalkit"}),
        ("red.", {"lenient", "lmms_eval"}),
        ("r-ed", {"lmms_eval"}),
    ],
)
def test_variants_of_exact_match(make_sample, prediction: str, equal_in: set[str]) -> None:
    variants = ("lenient", "raw", "lower", "lmms_eval", "vlmevalkit")
    assert {
        variant for variant in variants if _value(f"exact_match:{variant}", prediction, make_sample("red"))
    } == equal_in


def test_gqa_by_question_type(make_sample) -> None:
    samples = [
        make_sample("yes", types={"structural": "verify", "semantic": "attr"}),
        make_sample("red", types={"structural": "query", "semantic": "attr"}),
        make_sample("left", types={"structural": "choose", "semantic": "rel"}),
        make_sample("red"),
    ]
    result = metric("gqa")(["yes", "Red", "left", "red"], samples)
    assert result.totals == {
        "gqa": 0.75,
        "binary": 1.0,
        "open": 0.0,
        "semantic/attr": 0.5,
        "semantic/rel": 1.0,
        "structural/choose": 1.0,
        "structural/query": 0.0,
        "structural/verify": 1.0,
    }
    assert metric("gqa:vlmevalkit")(["yes", "Red", "left", "red"], samples).totals["gqa"] == 1


def test_edit_distance() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == 3
    assert edit_distance("abc", "") == 3


@pytest.mark.parametrize(
    ("prediction", "answers", "paper", "server"),
    [
        ("Paris", ("paris",), 1, 1),
        ("pariz", ("paris", "x"), 0.8, 0.8),  # 1 edit of 5
        ("ab", ("ac",), 0, 0.5),  # NL is exactly 0.5
        ("abc", ("xyz",), 0, 0),
        # Three extra spaces: 3 edits of 6 if spaces count, 0 of 6 if they are squeezed.
        ("a    b", ("a b",), 0, 1),
        # The server divides the one edit by the raw length 6, not by the squeezed length 3: 5/6.
        ("a    c", ("a b",), 0, 5 / 6),
        # Two edits of 7: the upper-cased text has seven letters, as the other one.
        ("STRASSE", ("Stra\u00dfe",), 1 - 2 / 7, 1 - 2 / 7),
        # One edit of 6, or of 7 in upper case.
        ("Strase", ("Stra\u00dfe",), 5 / 6, 6 / 7),
        ("", ("",), 1, 1),
        ("x", ("",), 0, 0),
    ],
)
def test_anls(make_sample, prediction: str, answers: tuple[str, ...], paper: float, server: float) -> None:
    assert _value("anls", prediction, make_sample(*answers)) == pytest.approx(paper)
    assert _value("anls:paper", prediction, make_sample(*answers)) == pytest.approx(paper)
    assert _value("anls:docvqa_server", prediction, make_sample(*answers)) == pytest.approx(server)


def test_anls_in_any_order_of_the_spans(make_sample) -> None:
    sample = make_sample("red, green, blue")
    assert _value("anls:permuted", "blue, red, green", sample) == 1
    assert _value("anls", "blue, red, green", sample) < 1


def test_the_best_order_is_found_without_enumerating_the_orders(make_sample) -> None:
    draw = random.Random(3)
    for _ in range(300):
        parts = ["".join(draw.choices("ab,", k=draw.randint(0, 4))) for _ in range(draw.randint(1, 5))]
        given = ", ".join(draw.sample(parts, len(parts)))
        given = "".join(letter for letter in given if draw.random() < 0.8) + draw.choice(["", "a", "b, a"])
        best = max(paper(given, ", ".join(order)) for order in itertools.permutations(parts))
        assert _value("anls:permuted", given, make_sample(", ".join(parts))) == pytest.approx(best)


@pytest.mark.parametrize("number", [8, 10, 11, 16, 200])
def test_many_parts_are_matched_in_any_order(make_sample, number: int) -> None:
    parts = [f"{word} {count}" for count, word in enumerate(("red", "green", "blue", "white") * 50)][:number]
    given = random.Random(number).sample(parts, number)
    sample = make_sample(", ".join(parts))
    assert _value("anls:permuted", ", ".join(given), sample) == 1
    length = len(sample.answers[0])
    # A letter of one part and a whole part are wrong.
    given[0], given[1] = given[0][1:], ""
    lost = 1 + (length - len(", ".join(given)) - 1)
    assert _value("anls:permuted", ", ".join(given), sample) == pytest.approx(1 - lost / length)


def test_two_hundred_parts_may_have_other_separators(make_sample) -> None:
    parts = [f"{word} {count}" for count, word in enumerate(("red", "green", "blue", "white") * 50)]
    sample = make_sample(", ".join(parts))
    length = len(sample.answers[0])
    # Other separators cost one letter each.
    text = ",".join(random.Random(6).sample(parts, len(parts)))
    assert _value("anls:permuted", text, sample) == pytest.approx(len(text) / length)
    # Parts without a counterpart in the answer follow at the end.
    given = random.Random(5).sample(parts, len(parts))[:150]
    assert _value("anls:permuted", ", ".join(given), sample) == pytest.approx(len(", ".join(given)) / length)


@pytest.mark.parametrize(
    ("prediction", "target", "value"),
    [
        ("105", "100", 1),  # 5/100 = 0.05
        ("94.9", "100", 0),  # 5.1/100
        ("-95", "-100", 1),
        ("12%", "0.12", 1),
        ("12", "12%", 0),  # 12 against 0.12
        ("0", "0", 1),
        ("0.0", "0", 0),  # a target of 0 must match as a string
        ("1,000", "1000", 0),  # commas stay
        ("$5", "5", 0),
        ("Yes", "yes", 1),
        ("yes.", "yes", 0),
        ("nan", "5", 0),
        ("1e2", "100", 1),
    ],
)
def test_relaxed_accuracy(make_sample, prediction: str, target: str, value: float) -> None:
    assert _value("relaxed_accuracy", prediction, make_sample(target)) == value


def test_human_and_augmented_chart_questions_have_sub_scores(make_sample) -> None:
    samples = [make_sample("1", type="human_test"), make_sample("2", type="augmented_test")]
    assert metric("relaxed_accuracy")(["1", "3"], samples).totals == {
        "relaxed_accuracy": 0.5,
        "type/augmented_test": 0.0,
        "type/human_test": 1.0,
    }


def test_counting(make_sample) -> None:
    samples = [
        make_sample("2", issimple=1),
        make_sample("Twenty", issimple=0),
        make_sample("0"),
        make_sample("3"),
        make_sample("4"),
    ]
    result = metric("counting")(["Two", "20", "none", "a few", "5"], samples)
    assert result.values == (1, 1, 1, 0, 0)
    assert result.unparsed == 1
    assert result.totals == {"counting": 0.6, "complex": 1.0, "simple": 1.0}
    assert _value("counting", "two.", make_sample("2")) == 0
    assert _value("counting:lenient", "two.", make_sample("2")) == 1


def test_rsvqa_averages_over_the_non_numeric_types(make_sample) -> None:
    kinds = ["comp", "comp", "presence", "count"]
    result = metric("rsvqa")(
        ["Yes", "no", "yes", "3"],
        [make_sample("yes" if kind != "count" else "4", question_type=kind) for kind in kinds],
    )
    # comp 1/2, presence 1, count 0: (0.5 + 1) / 2, (0.5 + 1 + 0) / 3, 2/4.
    assert (result.totals["rsvqa"], result.totals["average"], result.totals["overall"]) == (0.75, 0.5, 0.5)
    with pytest.raises(UserError, match="question_type"):
        metric("rsvqa")(["yes"], [make_sample("yes")])


def test_a_sentence_is_consistent_only_if_all_its_pictures_are_correct() -> None:
    assert consistency([("a", 1.0), ("b", 1.0), ("a", 1.0), ("b", 0.0), ("c", 1.0)]) == pytest.approx(2 / 3)
    assert consistency([("a", 1.0), ("a", math.nan), ("a", 1.0)]) == 0
    assert math.isnan(consistency([]))
