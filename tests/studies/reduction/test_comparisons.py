"""Pairwise tests of methods on known answers."""

import numpy as np
import pytest

from parcelray.studies.reduction.comparisons import PairwiseTest, run_tests

from .known_scores import samples, summary

SAMPLES = samples(["count"] * 400)


def _correct(share: float, seed: int) -> list[bool]:
    return [bool(each < share) for each in np.random.default_rng(seed).random(400)]


def test_a_difference_is_paired_so_only_samples_that_differ_widen_its_interval() -> None:
    base = _correct(0.5, 0)
    # 40 of the samples that the baseline gets wrong are correct.
    better = [each or index in np.flatnonzero(~np.array(base))[:40] for index, each in enumerate(base)]
    (result,) = run_tests([PairwiseTest("better", 8, summary(SAMPLES, {8: better}), [summary(SAMPLES, {8: base})])])
    assert result.difference.value == pytest.approx(10)
    # 40 of 400 samples differ by one: a proportion of 0.1, whatever the other 360 are. Two more pairs are added.
    centre, half = 100 * 40 / 402, 100 * 1.966 * np.sqrt(36 + 2) / 402
    assert result.difference.low == pytest.approx(centre - half, abs=0.02)
    assert result.difference.high == pytest.approx(centre + half, abs=0.02)
    assert result.p_value < 1e-8
    assert result.spread is None


def test_random_sampling_is_the_mean_over_its_seeds_with_their_spread() -> None:
    seeds = [summary(SAMPLES, {8: [True] * count + [False] * (400 - count)}) for count in (180, 200, 220)]
    test = PairwiseTest("same", 8, summary(SAMPLES, {8: [True] * 200 + [False] * 200}), seeds)
    (result,) = run_tests([test])
    assert result.difference.value == pytest.approx(0)
    assert result.p_value > 0.5
    assert result.spread == pytest.approx(5)


def test_all_tests_of_a_table_are_corrected_together() -> None:
    base = summary(SAMPLES, {8: _correct(0.5, 1)})
    results = run_tests(
        [PairwiseTest(str(seed), 8, summary(SAMPLES, {8: _correct(0.5, seed)}), [base]) for seed in range(2, 22)]
    )
    smallest = min(results, key=lambda each: each.p_value)
    assert smallest.p_holm == pytest.approx(min(1, 20 * smallest.p_value))
    assert all(each.p_holm >= each.p_value for each in results)


def test_families_have_equal_weights_whatever_their_size() -> None:
    questions = [*samples(["count"] * 90, "large"), *samples(["count"] * 10, "small")]
    base = summary(questions, {8: [False] * 100})
    (result,) = run_tests([PairwiseTest("one family", 8, summary(questions, {8: [False] * 90 + [True] * 10}), [base])])
    assert result.difference.value == pytest.approx(50)
