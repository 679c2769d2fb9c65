"""Paired comparison of two models, or of two budgets, on the same samples."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

from parcelray.errors import UserError
from parcelray.evaluation.scoring.aggregate import difference
from parcelray.evaluation.scoring.intervals import Interval
from parcelray.evaluation.scoring.split_scores import Estimate, GivenAnswer, SplitScores, score_splits


class McNemar(NamedTuple):
    """Result of McNemar's exact test on the same samples (McNemar, Psychometrika 1947)."""

    only_first: int
    """Number of samples that only the first answers correctly."""
    only_second: int
    """Number of samples that only the second answers correctly."""
    p_value: float
    """Two-sided p-value of the null hypothesis that both are equally often correct."""


class Comparison(NamedTuple):
    """Comparison of the first with the second on one split."""

    split: str
    metric: str
    first: Interval
    second: Interval
    difference: Interval
    """First minus second, paired."""
    p_value: float
    """Two-sided p-value, from the bootstrap draws of the difference; at least 1 / number of draws."""
    mcnemar: McNemar | None
    """Result of McNemar's test; None if answers can be partly correct."""
    n: int
    """Number of samples that both have."""


def mcnemar(first: Sequence[float], second: Sequence[float]) -> McNemar | None:
    """Runs McNemar's test on values of the same samples; returns None if a value is neither 0 nor 1."""
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if not (math.isnan(a) or math.isnan(b))]
    if any(value not in (0.0, 1.0) for pair in pairs for value in pair):
        return None
    only_first = sum(a > b for a, b in pairs)
    only_second = sum(b > a for a, b in pairs)
    discordant = only_first + only_second
    return McNemar(only_first, only_second, float(binomtest(only_first, discordant).pvalue) if discordant else 1.0)


def compare(first: SplitScores, first_budget: int, second: SplitScores, second_budget: int) -> Comparison:
    """Compares one split of two evaluations, or at two budgets of one, on the samples that both have.

    Raises:
        UserError: the scores cannot be compared: the metrics differ, no sample is in common, or a corpus metric was
            computed on different or partial sets.
    """
    if first.metric != second.metric:
        raise UserError(
            f"{first.name} is scored by {first.metric} in the first evaluation and by {second.metric} in the second;"
            " score both by the same metric."
        )
    ours, theirs = ({sample.id: index for index, sample in enumerate(split.samples)} for split in (first, second))
    shared = [name for name in ours if name in theirs]
    if not shared:
        raise UserError(
            f"The two evaluations have no sample of {first.name} in common; evaluate both on the same rows."
        )
    if not first.additive and (
        len(shared) < max(len(ours), len(theirs)) or not (first.rules.whole and second.rules.whole)
    ):
        raise UserError(
            f"{first.metric} on {first.name} is defined on the whole split and cannot be compared on a part of it;"
            " evaluate both without a limit."
        )
    one = _part(first, [ours[name] for name in shared], first_budget)
    other = _part(second, [theirs[name] for name in shared], second_budget)
    gap = difference(one.scores[first_budget].estimate, other.scores[second_budget].estimate)
    return Comparison(
        split=first.name,
        metric=first.metric,
        first=one.scores[first_budget].estimate.interval,
        second=other.scores[second_budget].estimate.interval,
        difference=gap.interval,
        p_value=two_sided(gap),
        mcnemar=mcnemar(one.scores[first_budget].values, other.scores[second_budget].values),
        n=len(shared),
    )


def two_sided(gap: Estimate) -> float:
    """Computes a two-sided p-value: twice the smaller share of draws on either side of zero; zeros count for both."""
    draws = gap.draws[np.isfinite(gap.draws)]
    if not len(draws):
        return math.nan
    below, above = float(np.mean(draws <= 0)), float(np.mean(draws >= 0))
    return min(1.0, max(2 * min(below, above), 1 / len(draws)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Applies Holm's correction for several tests (Holm, Scandinavian Journal of Statistics 1979).

    Returns:
        The corrected p-values in the given order; NaN stays NaN and does not count as a test.
    """
    known = sorted((value, index) for index, value in enumerate(p_values) if not math.isnan(value))
    corrected = [math.nan] * len(p_values)
    largest = 0.0
    for rank, (value, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * value))
        corrected[index] = largest
    return corrected


def _part(split: SplitScores, indices: Sequence[int], budget: int) -> SplitScores:
    """Scores some of a split's samples again, at one budget."""
    if list(indices) == list(range(len(split.samples))):
        return split
    answers: dict[int, list[GivenAnswer]] = {budget: [split.answers[budget][index] for index in indices]}
    return score_splits(
        [split.samples[index] for index in indices], answers, replace(split.rules, split_of=lambda sample: split.name)
    )[0]
