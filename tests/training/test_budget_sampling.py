"""Budgets of a step: a pure function of seed and step, drawn from the configured distribution."""

import functools
import operator
from collections import Counter

import pytest
from pydantic import ValidationError

from parcelray.config.connector import ConnectorConfig, M3ConnectorConfig, MqtConnectorConfig, ParcelConnectorConfig
from parcelray.config.train import (
    BudgetConfig,
    BudgetRange,
    BudgetValues,
    LogUniformBudgets,
    SandwichBudgets,
    StratifiedBudgets,
    Stratum,
    UniformBudgets,
    WeightedBudgets,
)
from parcelray.errors import UnsupportedBudgetError, UserError
from parcelray.models.connectors import Connector, build_connector
from parcelray.training.budget_sampling import BudgetSampler


def _connector(config: ConnectorConfig, grid_size: int = 16) -> Connector:
    return build_connector(config, hidden_size=32, grid_size=grid_size, mlp_width=64)


PARCEL = _connector(ParcelConnectorConfig(num_heads=4))
SUPERNET = _connector(ParcelConnectorConfig(num_heads=4, anchor_grids=(0, 1, 4, 8)))
M3 = _connector(M3ConnectorConfig())
EIGHT = BudgetRange(start=16, stop=30, step=2)
CONFIGS = [
    UniformBudgets(budgets=EIGHT),
    WeightedBudgets(budgets=(16, 64), weights=(1, 3)),
    SandwichBudgets(budgets=EIGHT),
    LogUniformBudgets(budgets=EIGHT),
    StratifiedBudgets(),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.type)
def test_a_draw_depends_on_seed_and_step_only(config: BudgetConfig) -> None:
    forward = [BudgetSampler(config, 7, PARCEL).budgets(step) for step in range(100)]
    sampler = BudgetSampler(config, 7, PARCEL)
    assert [sampler.budgets(step) for step in reversed(range(100))] == forward[::-1]
    assert [BudgetSampler(config, 8, PARCEL).budgets(step) for step in range(100)] != forward


def test_the_draws_are_the_same_on_every_machine() -> None:
    sampler = BudgetSampler(UniformBudgets(), 0, PARCEL)
    assert [sampler.budgets(step) for step in range(5)] == [(170,), (230,), (34,), (232,), (228,)]


def test_uniform_draws_are_uniform() -> None:
    sampler = BudgetSampler(UniformBudgets(budgets=EIGHT), 0, PARCEL)
    counts = Counter(budget for step in range(4000) for budget in sampler.budgets(step))
    assert set(counts) == set(EIGHT.values())
    # 500 each; four standard deviations are 84.
    assert all(count == pytest.approx(500, abs=84) for count in counts.values())


def test_weighted_draws_follow_the_weights_of_the_ascending_budgets() -> None:
    sampler = BudgetSampler(WeightedBudgets(budgets=(64, 16), weights=(1, 3)), 0, PARCEL)
    counts = Counter(budget for step in range(4000) for budget in sampler.budgets(step))
    # Four standard deviations of a binomial with p = 1/4 are 110 of 4000.
    assert counts[16] == pytest.approx(1000, abs=110)


def test_the_sandwich_is_the_smallest_a_random_one_and_the_largest() -> None:
    sampler = BudgetSampler(SandwichBudgets(budgets=EIGHT), 0, PARCEL)
    steps = [sampler.budgets(step) for step in range(200)]
    assert {(first, last) for first, _, last in steps} == {(16, 30)}
    assert {middle for _, middle, _ in steps} == set(EIGHT.values())


def _probabilities(config: BudgetConfig, connector: Connector = PARCEL) -> dict[int, float]:
    sampler = BudgetSampler(config, 0, connector)
    return {budget: sampler.mean_per_step(functools.partial(operator.eq, budget)) for budget in config.values()}


@pytest.mark.parametrize(
    ("budgets", "expected"),
    [
        ((16, 64, 256), (1 / 3, 1 / 3, 1 / 3)),
        ((16, 32, 128), (1 / 4.5, 1.5 / 4.5, 2 / 4.5)),
        ((256,), (1,)),
    ],
)
def test_log_uniform_budgets_have_the_width_of_their_cell(
    budgets: tuple[int, ...], expected: tuple[float, ...]
) -> None:
    assert tuple(_probabilities(LogUniformBudgets(budgets=budgets)).values()) == pytest.approx(expected)


def test_log_uniform_draws_have_equal_shares_of_octaves() -> None:
    probabilities = _probabilities(LogUniformBudgets())
    octaves = [
        sum(share for budget, share in probabilities.items() if low < budget < 2 * low)
        + (probabilities[low] + probabilities[2 * low]) / 2
        for low in (16, 32, 64, 128)
    ]
    assert octaves == pytest.approx([0.25] * 4, abs=0.02)


def _grid(side: int) -> Connector:
    return _connector(ParcelConnectorConfig(num_heads=4), side)


@pytest.mark.parametrize(
    ("connector", "budgets", "strata"),
    [
        # The recipe with which PARCEL's queries learn.
        (
            PARCEL,
            BudgetRange(start=16, stop=256),
            {(16, 16): 1 / 8, (18, 62): 1 / 4, (64, 64): 1 / 8, (66, 256): 1 / 2},
        ),
        # 448 px: three routing intervals.
        (
            _grid(32),
            BudgetRange(start=16, stop=1024),
            {
                (16, 16): 1 / 12,
                (64, 64): 1 / 12,
                (256, 256): 1 / 12,
                (18, 62): 3 / 28,
                (66, 254): 6 / 28,
                (258, 1024): 12 / 28,
            },
        ),
        # Every scale of M3 is an interval of one budget; the queries of MQT are one interval.
        (M3, (4, 16, 64, 256), {(4, 4): 1 / 4, (16, 16): 1 / 4, (64, 64): 1 / 4, (256, 256): 1 / 4}),
        (_connector(MqtConnectorConfig(num_heads=4)), (16, 32, 64), {(16, 16): 1 / 4, (32, 64): 3 / 4}),
    ],
    ids=["224px", "448px", "m3", "mqt"],
)
def test_strata_follow_the_routing(
    connector: Connector, budgets: BudgetValues, strata: dict[tuple[int, int], float]
) -> None:
    probabilities = _probabilities(StratifiedBudgets(budgets=budgets), connector)
    assert sum(probabilities.values()) == pytest.approx(1)
    for (low, high), share in strata.items():
        within = [each for budget, each in probabilities.items() if low <= budget <= high]
        assert within == pytest.approx([share / len(within)] * len(within))


def test_strata_can_overlap_and_be_log_uniform() -> None:
    logarithmic = BudgetRange(start=16, stop=256)
    config = StratifiedBudgets(
        strata=(
            Stratum(share=1, budgets=(16,)),
            Stratum(share=1, budgets=(64,)),
            Stratum(share=6, budgets=logarithmic, draw="log_uniform"),
        )
    )
    plain = _probabilities(LogUniformBudgets(budgets=logarithmic))
    assert _probabilities(config) == pytest.approx(
        {budget: 0.75 * share + (0.125 if budget in (16, 64) else 0) for budget, share in plain.items()}
    )
    sampler = BudgetSampler(config, 0, PARCEL)
    drawn = Counter(budget for step in range(1000) for budget in sampler.budgets(step))
    # About 16 %; four standard deviations are 47 of 1000.
    assert drawn[16] == pytest.approx(1000 * (0.125 + 0.75 * plain[16]), abs=47)


@pytest.mark.parametrize(
    ("config", "passes"),
    [
        (UniformBudgets(budgets=(16, 64)), {(64, 16), (64,)}),
        (SandwichBudgets(budgets=(16, 40, 64)), {(64, 16, 16), (64, 16, 40), (64, 16)}),
    ],
    ids=["uniform", "sandwich"],
)
def test_the_teacher_runs_first_and_once(config: BudgetConfig, passes: set[tuple[int, ...]]) -> None:
    sampler = BudgetSampler(config, 0, PARCEL, with_largest=True)
    steps = [sampler.budgets(step) for step in range(60)]
    assert set(steps) == passes
    # The draws are those of a training without a teacher.
    alone = BudgetSampler(config, 0, PARCEL)
    assert all(set(alone.budgets(step)) <= set(step_budgets) for step, step_budgets in enumerate(steps))


def test_the_mean_of_a_step_counts_every_pass() -> None:
    uniform = UniformBudgets(budgets=(16, 64))
    assert BudgetSampler(uniform, 0, PARCEL).mean_per_step(float) == 40
    # Half of the steps run 64, and half of them 64 and 16.
    assert BudgetSampler(uniform, 0, PARCEL, with_largest=True).mean_per_step(float) == 72
    sandwich = SandwichBudgets(budgets=(16, 64))
    assert BudgetSampler(sandwich, 0, PARCEL).mean_per_step(lambda budget: 1) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": (16, 16)}, r"budgets \[16, 16\] is not a list of distinct budgets of at least 1"),
        ({"budgets": (0, 16)}, r"budgets \[0, 16\] is not a list of distinct budgets of at least 1"),
        ({"strata": ({"share": 0, "budgets": (16,)},)}, "greater than 0"),
        ({"strata": ({"share": 1, "budgets": ()},)}, "budgets is empty"),
        (
            {"budgets": (16, 64), "strata": ({"share": 1, "budgets": (16, 20)},)},
            r"strata must contain exactly the budgets 16, 64; missing: 64; not among them: 20. Change",
        ),
        (
            {"strata": ({"share": 1, "budgets": (16,)},)},
            r"16 to 256 in steps of 2; missing: 18, 20, 22, 24, 26, ...; not among them: none",
        ),
        ({"anchor_grids": (0, 4)}, "anchor_grids replaces the routing; list the strata"),
    ],
)
def test_wrong_strata_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StratifiedBudgets.model_validate(changes)


def test_unsupported_budgets_are_refused_with_the_legal_ones() -> None:
    config = UniformBudgets(budgets=(16, 33))
    BudgetSampler(config, 0, PARCEL)
    with pytest.raises(
        UnsupportedBudgetError,
        match=r"m3 does not support 33 visual tokens per image; legal budgets are 4, 16, 64, 256",
    ) as caught:
        BudgetSampler(config, 0, M3)
    assert caught.value.num_visual_tokens == 33


SPLITS = UniformBudgets(budgets=(2, 16, 64), anchor_grids=(0, 1, 4, 8))


def test_a_supernet_draws_every_grid_that_fits_its_budget() -> None:
    sampler = BudgetSampler(SPLITS, 3, SUPERNET)
    counts = Counter(
        (budget, sampler.anchor_grid(step, 0, budget)) for step in range(3000) for budget in sampler.budgets(step)
    )
    assert set(counts) == {(2, 0), (2, 1), (16, 0), (16, 1), (16, 4), (64, 0), (64, 1), (64, 4), (64, 8)}
    # A third of the steps has 64 tokens, and a quarter of these has each grid: 250 each.
    assert all(counts[64, side] == pytest.approx(250, abs=62) for side in (0, 1, 4, 8))
    again = BudgetSampler(SPLITS, 3, SUPERNET)
    assert [again.anchor_grid(step, 0, 64) for step in range(50)] == [
        sampler.anchor_grid(step, 0, 64) for step in range(50)
    ]
    assert BudgetSampler(UniformBudgets(), 0, PARCEL).anchor_grid(5, 0, 64) is None


def test_unsupported_anchor_grids_are_refused() -> None:
    BudgetSampler(SPLITS, 0, SUPERNET)
    with pytest.raises(UserError, match=r"anchor_grid 8 is not one of this parcel's anchor_grids \(0, 1, 4\)"):
        BudgetSampler(SPLITS, 0, _connector(ParcelConnectorConfig(num_heads=4, anchor_grids=(0, 1, 4))))
    with pytest.raises(UserError, match="m3 does not support a choice of the anchor grid"):
        BudgetSampler(SPLITS, 0, M3)
    with pytest.raises(ValidationError, match="none of the anchor_grids"):
        UniformBudgets(budgets=(4, 16), anchor_grids=(4, 8))


def test_the_state_has_seed_and_configuration() -> None:
    assert BudgetSampler(UniformBudgets(budgets=(16, 64)), 3, PARCEL).state() == {
        "seed": 3,
        "config": {"type": "uniform", "budgets": [16, 64], "anchor_grids": None},
        "with_largest": False,
    }
