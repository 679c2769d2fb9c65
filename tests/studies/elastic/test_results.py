"""Retention, differences and targets of the elastic study, on made-up scores."""

import pytest

from parcelray.studies.elastic.results import anchor_answer, targets

from .made_up import BUDGETS, made_results


def test_a_budget_that_a_system_lacks_counts_as_the_largest_one_below() -> None:
    results = made_results()
    assert [results.used("m3", budget) for budget in BUDGETS] == [16, 16, 16, 16, 64, 64, 64, 64, 256]
    assert results.score("m3", 48).value == results.score("m3", 16).value
    assert results.used("vanilla", 16) == 256, "the vanilla model has only its own budget"


def test_retention_is_relative_to_the_vanilla_model_of_the_same_seed() -> None:
    results = made_results()
    expected = 100 * (96 / 100 + 97 / 101) / 2
    for family in ("overall", "general"):
        assert results.retention("parcel", 64, family).value == pytest.approx(expected)


def test_intervals_cover_seeds_and_scenes() -> None:
    one, two = (made_results(seeds, step=20).score("parcel", 64).interval for seeds in (1, 2))
    assert two.value == one.value + 5
    assert two.high - two.low > 1.5 * (one.high - one.low), "the seeds differ by 10 percentage points"
    gain = made_results(step=20).gain("parcel", 16, 256).interval
    assert (gain.value, gain.low, gain.high) == pytest.approx((0, 0, 0), abs=1.5), "each seed has the same at both"


def test_targets_are_met_or_not_with_the_numbers_that_decide() -> None:
    assert [target.met for target in targets(made_results())] == [True] * 7
    falling = {budget: 96 if budget < 128 else 60 for budget in BUDGETS}
    found = targets(made_results(parcel=falling))
    assert [target.met for target in found] == [False, True, False, True, True, True, False]
    assert "64 to 128: -18.0 [" in found[0].numbers
    assert found[2].numbers.startswith("60.2 [")
    # One right answer more is not shown to be better.
    close = targets(made_results(parcel=dict.fromkeys(BUDGETS, 51)))
    assert [target.met for target in close] == [True, False, False, True, False, False, False]


def test_the_effect_of_anchors_is_stated_by_budget() -> None:
    better = {budget: 60 if budget < 64 else 94 for budget in BUDGETS}
    assert anchor_answer(made_results(mqt_local=better)) == (
        "PARCEL scores more than MQT with the local start at 16, 24, 32, 48; no difference is shown at 64, 96, 128,"
        " 192, 256."
    )
