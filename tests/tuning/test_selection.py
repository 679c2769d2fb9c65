"""Choices among finished trials: by expression, by family, and by budget."""

import numpy as np
import pytest

from parcelray.errors import UserError
from parcelray.evaluation.scoring.estimate import Estimate
from parcelray.tuning.selection import choose_families, choose_splits, parse_selection, routing_of

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
def test_a_selection_is_the_best_trial_within_the_limits(text: str, expected: int) -> None:
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
def test_a_malformed_selection_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(
        UserError, match=r"write max METRIC subject to .* for example: max retention subject to tokens <= 64"
    ):
        parse_selection(text)


def test_an_unknown_metric_and_an_impossible_limit_are_named() -> None:
    with pytest.raises(
        UserError, match=r"'speed', which no finished trial measured; name one of: latency_ms, retention, tokens"
    ):
        parse_selection("max speed").choose(TRIALS)
    with pytest.raises(UserError, match=r"No finished trial has tokens <= 8; tokens is 16 to 256"):
        parse_selection("max retention subject to tokens <= 8").choose(TRIALS)


def test_the_cheapest_trial_within_one_standard_error_is_chosen_for_each_family() -> None:
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 5, 2000)

    def estimate(value: float, noise: float) -> Estimate:
        return Estimate(value, value + shared + rng.normal(0, noise, 2000), 100)

    families = {
        "video": {0: estimate(80.0, 2.0), 1: estimate(79.0, 2.0), 2: estimate(60.0, 2.0)},
        "general": {0: estimate(70.0, 0.1), 1: estimate(68.0, 0.1)},
    }
    general, video = choose_families(families, lambda index: [256, 64, 8][index])
    assert (video.family, video.trial, video.best, video.near) == ("video", 1, 0, 2)
    assert video.retention.low < 79.0 < video.retention.high
    assert video.best_retention.value == 80.0
    assert (general.trial, general.best, general.near) == (0, 0, 1), (
        "in a paired comparison, two points are many standard errors"
    )


def _estimate(value: float, noise: float = 0.0, seed: int = 0) -> Estimate:
    """Returns an estimate whose draws share their noise with all others, plus independent noise."""
    shared, own = (
        np.random.default_rng(99).normal(0, 5, 500),
        np.random.default_rng(seed).normal(0, noise, 500) if noise else 0.0,
    )
    return Estimate(value, value + shared + own, 100)


def test_the_cheapest_split_within_one_standard_error_is_chosen() -> None:
    retention = {
        16: {0: _estimate(60.0), 2: _estimate(59.0, noise=3.0, seed=1), 4: _estimate(40.0)},
        64: {0: _estimate(70.0), 8: _estimate(68.0)},
    }
    gflops = {16: {0: 3.0, 2: 2.0, 4: 1.0}, 64: {0: 3.0, 8: 1.0}}
    first, second = choose_splits(retention, gflops, {16: 4, 64: 8})
    assert (first.anchor_grid, first.best, first.rule) == (2, 0, 4), "one point worse, with a paired error of three"
    assert first.against_rule is not None
    assert first.against_rule.value == pytest.approx(19.0)
    # The shared noise cancels in the paired difference, so two points are many standard errors.
    assert (second.anchor_grid, second.best) == (0, 0)
    assert second.against_rule is not None
    assert second.against_rule.low == pytest.approx(2.0)


def test_a_routing_covers_all_budgets_from_the_smallest_searched_budget() -> None:
    retention = {budget: {grid: _estimate(50.0)} for budget, grid in ((4, 1), (16, 4), (32, 4), (64, 8))}
    splits = choose_splits(
        retention, {budget: dict.fromkeys(by_grid, 1.0) for budget, by_grid in retention.items()}, {}
    )
    routes = [(route.min_budget, route.max_budget, route.anchor_grid) for route in routing_of(splits, 256)]
    assert routes == [(4, 15, 1), (16, 63, 4), (64, 256, 8)]
    assert all(split.against_rule is None for split in splits)
