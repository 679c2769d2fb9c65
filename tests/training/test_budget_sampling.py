"""Budgets of a step: a pure function of seed and step, drawn from the configured distribution."""

from collections import Counter

import pytest
from pydantic import ValidationError

from parcelray.config.connector import ConnectorConfig, M3ConnectorConfig, ParcelConnectorConfig
from parcelray.config.train import BudgetConfig, BudgetRange, SandwichBudgets, UniformBudgets, WeightedBudgets
from parcelray.errors import UnsupportedBudgetError, UserError
from parcelray.models.connectors import Connector, build_connector
from parcelray.training.budget_sampling import BudgetSampler

EIGHT = BudgetRange(start=16, stop=30, step=2)
CONFIGS = [
    UniformBudgets(budgets=EIGHT),
    WeightedBudgets(budgets=(16, 64), weights=(1, 3)),
    SandwichBudgets(budgets=EIGHT),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.type)
def test_a_draw_depends_on_seed_and_step_only(config: BudgetConfig) -> None:
    forward = [BudgetSampler(config, 7).budgets(step) for step in range(100)]
    sampler = BudgetSampler(config, 7)
    assert [sampler.budgets(step) for step in reversed(range(100))] == forward[::-1]
    assert [BudgetSampler(config, 8).budgets(step) for step in range(100)] != forward


def test_the_draws_are_the_same_on_every_machine() -> None:
    sampler = BudgetSampler(UniformBudgets(), 0)
    assert [sampler.budgets(step) for step in range(5)] == [(170,), (230,), (34,), (232,), (228,)]


def test_uniform_draws_are_uniform() -> None:
    sampler = BudgetSampler(UniformBudgets(budgets=EIGHT), 0)
    counts = Counter(budget for step in range(4000) for budget in sampler.budgets(step))
    assert set(counts) == set(EIGHT.values())
    # 500 each; four standard deviations are 84.
    assert all(count == pytest.approx(500, abs=84) for count in counts.values())


def test_weighted_draws_follow_the_weights_of_the_ascending_budgets() -> None:
    sampler = BudgetSampler(WeightedBudgets(budgets=(64, 16), weights=(1, 3)), 0)
    counts = Counter(budget for step in range(4000) for budget in sampler.budgets(step))
    # Four standard deviations of a binomial with p = 1/4 are 110 of 4000.
    assert counts[16] == pytest.approx(1000, abs=110)


def test_the_sandwich_is_the_smallest_a_random_one_and_the_largest() -> None:
    sampler = BudgetSampler(SandwichBudgets(budgets=EIGHT), 0)
    steps = [sampler.budgets(step) for step in range(200)]
    assert {(first, last) for first, _, last in steps} == {(16, 30)}
    assert {middle for _, middle, _ in steps} == set(EIGHT.values())


def test_unsupported_budgets_are_refused_with_the_legal_ones() -> None:
    sampler = BudgetSampler(UniformBudgets(budgets=(16, 33)), 0)
    sampler.check(_connector(ParcelConnectorConfig(num_heads=4)))
    with pytest.raises(
        UnsupportedBudgetError,
        match=r"m3 does not support 33 visual tokens per image; legal budgets are 4, 16, 64, 256",
    ) as caught:
        sampler.check(_connector(M3ConnectorConfig()))
    assert caught.value.num_visual_tokens == 33


def _connector(config: ConnectorConfig) -> Connector:
    return build_connector(config, hidden_size=32, grid_size=16, mlp_width=64)


SPLITS = UniformBudgets(budgets=(2, 16, 64), anchor_grids=(0, 1, 4, 8))


def test_a_supernet_draws_every_grid_that_fits_its_budget() -> None:
    sampler = BudgetSampler(SPLITS, 3)
    counts = Counter(
        (budget, sampler.anchor_grid(step, 0, budget)) for step in range(3000) for budget in sampler.budgets(step)
    )
    assert set(counts) == {(2, 0), (2, 1), (16, 0), (16, 1), (16, 4), (64, 0), (64, 1), (64, 4), (64, 8)}
    # A third of the steps has 64 tokens, and a quarter of these has each grid: 250 each.
    assert all(counts[64, side] == pytest.approx(250, abs=62) for side in (0, 1, 4, 8))
    again = BudgetSampler(SPLITS, 3)
    assert [again.anchor_grid(step, 0, 64) for step in range(50)] == [
        sampler.anchor_grid(step, 0, 64) for step in range(50)
    ]
    assert BudgetSampler(UniformBudgets(), 0).anchor_grid(5, 0, 64) is None


def test_unsupported_anchor_grids_are_refused() -> None:
    BudgetSampler(SPLITS, 0).check(_connector(ParcelConnectorConfig(num_heads=4, anchor_grids=(0, 1, 4, 8))))
    with pytest.raises(UserError, match=r"anchor_grid 8 is not one of this parcel's anchor_grids \(0, 1, 4\)"):
        BudgetSampler(SPLITS, 0).check(_connector(ParcelConnectorConfig(num_heads=4, anchor_grids=(0, 1, 4))))
    with pytest.raises(UserError, match="m3 does not support a choice of the anchor grid"):
        BudgetSampler(SPLITS, 0).check(_connector(M3ConnectorConfig()))
    with pytest.raises(ValidationError, match="none of the anchor_grids"):
        UniformBudgets(budgets=(4, 16), anchor_grids=(4, 8))


def test_the_state_has_seed_and_configuration() -> None:
    assert BudgetSampler(UniformBudgets(budgets=(16, 64)), 3).state() == {
        "seed": 3,
        "config": {"type": "uniform", "budgets": [16, 64], "anchor_grids": None},
    }
