"""Intervals of shares, means and paired differences, against values computed by hand."""

import math

import numpy as np
import pytest

from parcelray.evaluation.scoring.intervals import (
    Design,
    all_correct_interval,
    combine,
    difference_stratum,
    mean_interval,
    share_interval,
)
from parcelray.evaluation.scoring.paired import holm

T9 = 2.262157
"""The 97.5 % quantile of Student's t distribution with 9 degrees of freedom."""
T19 = 2.093024


def _own(count: int) -> list[str]:
    return [str(index) for index in range(count)]


@pytest.mark.parametrize(
    ("values", "cluster_size", "low", "high"),
    [
        # 0 of 10 alone: the design effect is that of the prior, 1. t2 = 5.1174, and the upper limit t2 / (10 + t2).
        pytest.param([0.0] * 10, 1, 0.0, 0.3385, id="none of ten"),
        pytest.param([1.0] * 10, 1, 0.6615, 1.0, id="all of ten"),
        # 0 of 100 in tens: prior design effect 1 + 9 / 2 = 5.5, so 18.18 samples: 5.1174 / (18.18 + 5.1174).
        pytest.param([0.0] * 100, 10, 0.0, 0.2196, id="none of a hundred in tens"),
        # 15 of 20 alone: squares 20 x 0.75 x 0.25 = 3.75, cluster-robust 3.75 / (1 - 1 / 20) = 3.9474, design effect
        # (3.9474 + 1) / (3.75 + 1) = 1.0416, so 19.202 samples, t2 = 4.3807: centre 0.86407 / 1.22814 = 0.7036,
        # half 2.0930 / 1.22814 x sqrt(0.1875 / 19.202 + 4.3807 / (4 x 368.7)) = 0.1923.
        pytest.param([1.0] * 15 + [0.0] * 5, 1, 0.5113, 0.8958, id="fifteen of twenty"),
        # 50 of 100 in tens that are all right or all wrong: residuals 5 per cluster, cluster-robust 10 x 25 / 0.9 =
        # 277.8, squares 25, design effect (277.8 + 55) / (25 + 10) = 9.508, so 10.518 samples, half
        # 2.2622 / 1.48655 x sqrt(0.25 / 10.518 + 5.1174 / (4 x 110.62)) = 0.2861.
        pytest.param(([1.0] * 10 + [0.0] * 10) * 5, 10, 0.2139, 0.7861, id="clusters of equal answers"),
        # 1 of 20 alone: squares 0.95, cluster-robust 1, design effect 2 / 1.95, 19.5 samples, so 0.975 events: the
        # limit of Poisson 0.975 x (1 - 1 / 8.775 - 0.83923 x 2.0930 / (3 x 0.98742))^3 / 19.5 = 0.00123 is below
        # Wilson's; the upper one is (0.05 + 4.3807 / 39 + 2.0930 x sqrt(0.0475 / 19.5 + 4.3807 / 1521)) / 1.22465.
        pytest.param([1.0] + [0.0] * 19, 1, 0.00123, 0.2571, id="one of twenty"),
        # Twenty values of 0.3: squares 20 x 0.21 = 4.2, cluster-robust 0, design effect 1 / 5.2: 104 samples.
        # centre (0.3 + 4.3807 / 208) / 1.04212 = 0.3081, half 2.0084 x sqrt(0.21 / 104 + 4.3807 / 43264) = 0.0925.
        pytest.param([0.3] * 20, 1, 0.2156, 0.4006, id="equal partial values"),
    ],
)
def test_a_share_has_the_interval_of_wilson_with_the_design_effect(
    values: list[float], cluster_size: int, low: float, high: float
) -> None:
    clusters = [str(index // cluster_size) for index in range(len(values))]
    interval = share_interval(values, clusters)
    assert interval == pytest.approx((np.mean(values), low, high, len(values)), abs=2e-4)


def test_the_order_of_samples_and_unscored_samples_do_not_matter() -> None:
    values, clusters = [1.0, 0.0, 0.6, 1.0, 0.0, 0.9], ["a", "a", "b", "b", "c", "d"]
    expected = share_interval(values, clusters)
    assert share_interval(values[::-1], clusters[::-1]) == pytest.approx(expected)
    assert share_interval([*values, math.nan], [*clusters, "e"]) == pytest.approx(expected)
    assert share_interval([math.nan], ["a"])[3] == share_interval([], [])[3] == 0
    assert math.isnan(share_interval([], []).low)


def test_a_single_cluster_says_almost_nothing() -> None:
    assert share_interval([1.0] * 4, ["a"] * 4) == (1, 0, 1, 4)
    # Design effect 1 + 3 / 2, so 1.6 samples; with one degree of freedom, t2 = 161.4.
    assert share_interval([0.0] * 4, ["a"] * 4)[:3] == pytest.approx((0, 0, 1), abs=0.01)


def test_consistency_is_the_share_of_clusters_that_are_all_correct() -> None:
    values = [1.0, 1.0, 1.0, 0.0, 1.0, 0.9, 1.0, math.nan]
    interval = all_correct_interval(values, ["a", "a", "b", "b", "c", "c", "d", "e"])
    assert interval.value == 0.5
    assert interval.n == 4
    assert interval == pytest.approx(share_interval([1.0, 0.0, 0.0, 1.0], _own(4)))


def test_a_mean_has_the_t_interval() -> None:
    # Sample variance of 1, 2, 3, 4, ..., 10: 82.5 / 9 = 9.1667; standard error sqrt(0.91667) = 0.95743.
    values = [float(value) for value in range(1, 11)]
    assert mean_interval(values) == pytest.approx((5.5, 5.5 - T9 * 0.95743, 5.5 + T9 * 0.95743, 10), abs=1e-4)
    assert math.isnan(mean_interval([1.0]).low)
    assert math.isnan(mean_interval([]).value)


def _difference(differences: list[float], cluster_size: int = 1) -> tuple[float, float, float]:
    values_N = np.array(differences)
    sums_K = values_N.reshape(-1, cluster_size).sum(axis=1)
    counts_K = np.full(len(sums_K), float(cluster_size))
    squares = np.square(values_N - values_N.mean()).sum()
    stratum = difference_stratum(
        values_N.mean()[None], sums_K[None], squares[None], counts_K[None], np.ones(1), np.ones(1)
    )
    low, high, p_value = combine([stratum])
    return float(low), float(high), float(p_value)


def test_a_paired_difference_has_the_interval_of_bonett_and_price() -> None:
    # 4 to 1 of 20 pairs: centre 3 / 22 = 0.13636. Squares 5 - 9 / 20 = 4.55, cluster-robust 4.55 x 20 / 19 = 4.7895,
    # design effect (4.7895 + 1) / (4.55 + 1) = 1.04315. Variance 1.04315 x (4.55 + 2) / 484 = 0.014117, error 0.11882.
    low, high, p_value = _difference([1.0] * 4 + [-1.0] + [0.0] * 15)
    assert (low, high) == pytest.approx((0.13636 - T19 * 0.11882, 0.13636 + T19 * 0.11882), abs=1e-4)
    # t = 1.1477 with 19 degrees of freedom.
    assert p_value == pytest.approx(0.2653, abs=1e-3)


def test_equal_answers_do_not_prove_equal_models() -> None:
    # No difference in 20 pairs: variance 2 / 484, half 2.0930 x 0.06428.
    assert _difference([0.0] * 20) == pytest.approx((-0.13454, 0.13454, 1.0), abs=1e-4)


def test_the_p_value_agrees_with_the_interval() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        low, high, p_value = _difference((rng.integers(0, 2, 60) - rng.integers(0, 2, 60)).astype(float).tolist(), 6)
        assert (p_value < 0.05) == (low > 0 or high < 0)


def test_splits_that_share_their_clusters_vary_together() -> None:
    differences_SN = np.array([[1.0, -1.0] * 50, [1.0, -1.0] * 50])
    means, squares = differences_SN.mean(axis=1), np.square(differences_SN).sum(axis=1)
    half, scale = np.full(2, 0.5), np.ones(2)
    shared = difference_stratum(means, differences_SN, squares, np.ones((2, 100)), half, scale)
    apart = [
        difference_stratum(means[[0]], row[None], squares[[0]], np.ones((1, 100)), half[:1], scale[:1])
        for row in differences_SN
    ]
    both = float(shared.variance_X)
    assert both == pytest.approx(2 * sum(float(each.variance_X) for each in apart), rel=0.05)
    assert combine(apart)[1] < combine([shared])[1]


def test_unequal_clusters_lower_the_degrees_of_freedom() -> None:
    assert Design(np.full(10, 4.0)).freedom == pytest.approx(9)
    # 40 samples, sum of squares 31^2 + 9 = 970: 1600 / 970 - 1 = 0.65, at least 1.
    assert Design(np.array([31.0] + [1.0] * 9)).freedom == 1


def test_holm_correction_matches_the_paper() -> None:
    # 4 x 0.01 = 0.04; 3 x 0.02 = 0.06; 2 x 0.03 = 0.06; 1 x 0.04 is below the last and takes its value.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    found = holm([0.01, float("nan")])
    assert found[0] == 0.01
    assert np.isnan(found[1])
    assert holm([]) == []
