"""Joint draws of estimates, and intervals of numbers that are derived from them."""

import math

import numpy as np
import pytest

from parcelray.evaluation.scoring.aggregate import retention_of
from parcelray.evaluation.scoring.estimate import ClusteredValues, Estimate, difference, estimate_means, mean_of
from parcelray.evaluation.scoring.intervals import share_interval

COINS = [float(index % 2) for index in range(200)]
SCENES = [str(index) for index in range(200)]


def test_the_draws_have_the_interval_of_the_share() -> None:
    for values in (COINS, [0.0] * 200, [1.0] * 200, [1.0] * 3 + [0.0] * 197):
        (estimate,) = estimate_means([ClusteredValues(values, SCENES, scale=100)], seed=1, draws=20000)
        interval = estimate.interval
        assert interval[1:3] == pytest.approx([100 * limit for limit in share_interval(values, SCENES)[1:3]])
        drawn = Estimate(estimate.value, estimate.draws, 200).interval
        assert drawn[1:3] == pytest.approx(interval[1:3], abs=0.6)


def test_a_score_of_zero_is_not_certain_in_means_and_ratios() -> None:
    zero, half = estimate_means([ClusteredValues([0.0] * 200, SCENES), ClusteredValues(COINS, SCENES)], seed=0)
    # 0 of 200: the upper limit is 3.89 / (200 + 3.89) = 0.019.
    assert zero.interval.high == pytest.approx(0.019, abs=1e-3)
    assert mean_of([zero]).interval == zero.interval
    several = mean_of(
        [zero, *estimate_means([ClusteredValues([0.0] * 200, SCENES, key=key) for key in range(1, 8)], 0)]
    )
    assert (several.interval.value, several.interval.low) == (0, 0)
    assert several.interval.high > 0.002
    assert 3 < retention_of(zero, half).interval.high < 5


def test_estimates_that_share_their_clusters_vary_together() -> None:
    other = [f"other {scene}" for scene in SCENES]
    rows = [ClusteredValues(COINS, SCENES), ClusteredValues(COINS, SCENES), ClusteredValues(COINS, other)]
    first, same, apart = estimate_means(rows, seed=1)
    assert (first.draws == same.draws).all()
    assert difference(first, same).interval[:3] == (0, 0, 0)
    assert abs(np.corrcoef(first.draws, apart.draws)[0, 1]) < 0.1
    opposite = estimate_means([ClusteredValues([1 - value for value in COINS], SCENES, key=1)], seed=1)[0]
    # Only the pairs that are added, one in favor of either side, vary: sqrt(2) / 202 / 2, where each has 0.035.
    assert mean_of([first, opposite]).std_error == pytest.approx(0.0035, rel=0.1)


def test_the_same_values_of_other_answers_do_not_prove_equality() -> None:
    rows = [ClusteredValues(COINS, SCENES, key=key) for key in range(2)]
    gap = difference(*estimate_means(rows, seed=1)).interval
    # As the paired difference: t x sqrt(2) / 202.
    assert gap[:3] == pytest.approx((0, -0.0138, 0.0138), abs=0.002)


def test_evaluations_on_the_same_samples_are_paired() -> None:
    (first,) = estimate_means([ClusteredValues(COINS, SCENES)], seed=3)
    better = [1.0 if index % 20 == 0 else value for index, value in enumerate(COINS)]
    (second,) = estimate_means([ClusteredValues(better, SCENES)], seed=3)
    # 10 of 200 pairs differ: the error of the difference is sqrt(0.05 - 0.05^2) / sqrt(200) = 0.0154, not 0.05.
    assert difference(second, first).std_error == pytest.approx(0.0154, rel=0.1)


def test_whole_clusters_are_uncertain() -> None:
    # Ten scenes of twenty equal values: as uncertain as ten values.
    values = [float(index // 20 % 2) for index in range(200)]
    (clustered,) = estimate_means([ClusteredValues(values, [str(index // 20) for index in range(200)])], seed=0)
    assert clustered.interval.high - clustered.interval.low > 0.5


def test_values_that_are_no_share_have_the_t_interval() -> None:
    values = np.random.default_rng(0).normal(3, 2, size=500)
    (estimate,) = estimate_means([ClusteredValues(values.tolist(), [str(each) for each in range(500)], share=False)], 1)
    error = values.std(ddof=1) / math.sqrt(500)
    assert estimate.interval[:3] == pytest.approx(
        (values.mean(), *(values.mean() + 1.9647 * error * np.array([-1, 1])))
    )
    assert estimate.std_error == pytest.approx(error, rel=0.08)


def test_unscored_samples_are_left_out() -> None:
    rows = [ClusteredValues([1.0, math.nan, 0.0], ["a", "b", "c"]), ClusteredValues([math.nan], ["a"])]
    some, none = estimate_means(rows, seed=0)
    assert (some.value, some.n) == (0.5, 2)
    assert (none.n, math.isnan(none.value), math.isnan(none.interval.low)) == (0, True, True)
