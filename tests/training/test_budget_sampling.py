"""Budgets of a step: a pure function of seed and step, drawn as the configuration says."""

from collections import Counter

import pytest

from parcelray.config.budget import BudgetConfig, BudgetRange, SandwichBudgets, UniformBudgets, WeightedBudgets
from parcelray.errors import UnsupportedBudgetError
from parcelray.training.budget_sampling import BudgetSampler

EIGHT = BudgetRange(start=16, stop=30, step=2)
CONFIGS = [UniformBudgets(budgets=EIGHT), WeightedBudgets(budgets=(16, 64), weights=(1, 3)), SandwichBudgets(budgets=EIGHT)]


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


def test_budgets_that_the_connector_cannot_give_are_refused_with_the_legal_ones() -> None:
    sampler = BudgetSampler(UniformBudgets(budgets=(16, 33)), 0)
    sampler.check((16, 32, 33), "parcel")
    with pytest.raises(UnsupportedBudgetError, match=r"m3 cannot give 33 visual tokens per image; legal budgets are 1, 4, 16, 64, 256") as caught:
        sampler.check((1, 4, 16, 64, 256), "m3")
    assert caught.value.num_visual_tokens == 33


def test_the_state_says_what_the_draws_depend_on() -> None:
    assert BudgetSampler(UniformBudgets(budgets=(16, 64)), 3).state() == {"seed": 3, "config": {"type": "uniform", "budgets": [16, 64]}}
