"""Selections in words, and what they choose."""

import pytest

from parcelray.errors import UserError
from parcelray.tuning.selection import parse_selection

TRIALS = [
    {"retention": 70.0, "tokens": 16.0, "latency_ms": 9.0},
    {"retention": 80.0, "tokens": 64.0, "latency_ms": 20.0},
    {"retention": 80.0, "tokens": 32.0, "latency_ms": 12.0},
    {"retention": 95.0, "tokens": 256.0},
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max retention subject to tokens <= 64", 1),
        ("max retention", 3),
        ("min tokens subject to retention >= 75", 2),
        ("max retention subject to tokens <= 64 and latency_ms <= 15", 2),
        ("  max   retention  subject to tokens<=63.5, retention >= 1e1", 2),
    ],
)
def test_a_selection_is_the_best_that_keeps_the_limits(text: str, expected: int) -> None:
    assert parse_selection(text).choose(TRIALS) == expected


@pytest.mark.parametrize(
    "text",
    [
        "retention",
        "max",
        "max retention subject to tokens",
        "max retention subject to tokens < 64",
        "max retention subject to tokens <= x",
    ],
)
def test_another_form_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(
        UserError, match=r"write max METRIC subject to .* for example: max retention subject to tokens <= 64"
    ):
        parse_selection(text)


def test_what_was_not_measured_and_what_nothing_keeps_are_named() -> None:
    with pytest.raises(
        UserError, match=r"'speed', which no finished trial measured; measured: latency_ms, retention, tokens"
    ):
        parse_selection("max speed").choose(TRIALS)
    with pytest.raises(UserError, match=r"No finished trial has tokens <= 8; tokens is 16 to 256"):
        parse_selection("max retention subject to tokens <= 8").choose(TRIALS)
