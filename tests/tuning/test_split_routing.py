"""From retentions to a routing."""

import numpy as np
import pytest

from parcelray.evaluation.scoring.split_scores import Estimate
from parcelray.tuning.split_routing import choose_splits, routing_of


def _estimate(value: float, noise: float = 0.0, seed: int = 0) -> Estimate:
    """Draws that are all the same, apart from noise of their own."""
    shared, own = (
        np.random.default_rng(99).normal(0, 5, 500),
        np.random.default_rng(seed).normal(0, noise, 500) if noise else 0.0,
    )
    return Estimate(value, value + shared + own, 100)


def test_the_best_split_or_a_cheaper_one_within_a_standard_error() -> None:
    retention = {
        16: {0: _estimate(60.0), 2: _estimate(59.0, noise=3.0, seed=1), 4: _estimate(40.0)},
        64: {0: _estimate(70.0), 8: _estimate(68.0)},
    }
    gflops = {16: {0: 3.0, 2: 2.0, 4: 1.0}, 64: {0: 3.0, 8: 1.0}}
    first, second = choose_splits(retention, gflops, {16: 4, 64: 8})
    assert (first.anchor_grid, first.best, first.rule) == (2, 0, 4), "one point below, with a paired error of three"
    assert first.against_rule is not None
    assert first.against_rule.value == pytest.approx(19.0)
    # Both draws are the same, so two points are many errors: the noise that they share does not count.
    assert (second.anchor_grid, second.best) == (0, 0)
    assert second.against_rule is not None
    assert second.against_rule.low == pytest.approx(2.0)


def test_a_routing_covers_all_budgets_from_the_smallest_searched_one_on() -> None:
    retention = {budget: {grid: _estimate(50.0)} for budget, grid in ((4, 1), (16, 4), (32, 4), (64, 8))}
    splits = choose_splits(
        retention, {budget: dict.fromkeys(by_grid, 1.0) for budget, by_grid in retention.items()}, {}
    )
    routes = [(route.min_budget, route.max_budget, route.anchor_grid) for route in routing_of(splits, 256)]
    assert routes == [(4, 15, 1), (16, 63, 4), (64, 256, 8)]
    assert all(split.against_rule is None for split in splits)
