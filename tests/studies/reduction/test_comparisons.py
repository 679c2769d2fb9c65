"""Comparisons of methods on answers that are known."""

import numpy as np
import pytest

from parcelray.studies.reduction.comparisons import DRAWS, Question, answer, gap_estimates

from .known_scores import samples, summary

ASKED = samples(["count"] * 400)


def _right(share: float, seed: int) -> list[bool]:
    return [bool(each < share) for each in np.random.default_rng(seed).random(400)]


def test_a_difference_is_paired_and_has_the_intervals_of_its_own_questions() -> None:
    base = _right(0.5, 0)
    # Of the questions that random sampling gets wrong, 40 are right now.
    better = [each or place in np.flatnonzero(~np.array(base))[:40] for place, each in enumerate(base)]
    (found,) = answer([Question("better", 8, summary(ASKED, {8: better}), [summary(ASKED, {8: base})])])
    assert found.difference.value == pytest.approx(10)
    # 40 of 400 differ by one: a proportion of 0.1, whatever the other 360 are.
    half = 100 * 1.96 * np.sqrt(0.1 * 0.9 / 400)
    assert found.difference.low == pytest.approx(10 - half, abs=0.35)
    assert found.difference.high == pytest.approx(10 + half, abs=0.35)
    assert found.p_value == 1 / DRAWS
    assert found.spread is None


def test_random_sampling_is_the_mean_over_its_seeds_with_their_spread() -> None:
    seeds = [summary(ASKED, {8: [True] * count + [False] * (400 - count)}) for count in (180, 200, 220)]
    question = Question("same", 8, summary(ASKED, {8: [True] * 200 + [False] * 200}), seeds)
    (found,) = answer([question])
    assert found.difference.value == pytest.approx(0)
    assert found.p_value > 0.5
    assert found.spread == pytest.approx(5)
    assert gap_estimates([question])[0].draws.shape == (DRAWS,)


def test_all_comparisons_of_a_table_are_corrected_together() -> None:
    base = summary(ASKED, {8: _right(0.5, 1)})
    found = answer([Question(str(seed), 8, summary(ASKED, {8: _right(0.5, seed)}), [base]) for seed in range(2, 22)])
    smallest = min(found, key=lambda each: each.p_value)
    assert smallest.p_holm == pytest.approx(min(1, 20 * smallest.p_value))
    assert all(each.p_holm >= each.p_value for each in found)


def test_families_weigh_alike_whatever_their_size() -> None:
    asked = [*samples(["count"] * 90, "large"), *samples(["count"] * 10, "small")]
    base = summary(asked, {8: [False] * 100})
    (found,) = answer([Question("one family", 8, summary(asked, {8: [False] * 90 + [True] * 10}), [base])])
    assert found.difference.value == pytest.approx(50)
