"""Two models, or two budgets, on the same samples."""

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
    """McNemar's exact test of two answers to the same questions (McNemar, Psychometrika 1947)."""

    only_first: int
    """Questions that only the first answers right."""
    only_second: int
    """Questions that only the second answers right."""
    p_value: float
    """Of as uneven a pair under equal chances, two-sided."""


class Comparison(NamedTuple):
    """The first against the second on one split."""

    split: str
    metric: str
    first: Interval
    second: Interval
    difference: Interval
    """First minus second, paired."""
    p_value: float
    """Two-sided, from the draws of the difference; never below one draw's share."""
    mcnemar: McNemar | None
    """None where answers can be half right."""
    n: int
    """Samples that both answered."""


def mcnemar(first: Sequence[float], second: Sequence[float]) -> McNemar | None:
    """The test on values of the same samples; None if a value is neither 0 nor 1."""
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
        UserError: the scores cannot be compared: other metrics, no sample in common, or a corpus metric on different or
            partial sets.
    """
    if first.metric != second.metric:
        raise UserError(
            f"{first.name} is scored by {first.metric} on one side and by {second.metric} on the other; score both"
            " alike."
        )
    ours, theirs = ({sample.id: place for place, sample in enumerate(split.samples)} for split in (first, second))
    shared = [name for name in ours if name in theirs]
    if not shared:
        raise UserError(
            f"The two evaluations have no sample of {first.name} in common; evaluate both on the same rows."
        )
    if not first.additive and (
        len(shared) < max(len(ours), len(theirs)) or not (first.rules.whole and second.rules.whole)
    ):
        raise UserError(
            f"{first.metric} on {first.name} is a score of the whole split, so it is not compared on a part of it;"
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
    """Twice the smaller share of draws on either side of zero, ties to both."""
    draws = gap.draws[np.isfinite(gap.draws)]
    if not len(draws):
        return math.nan
    below, above = float(np.mean(draws <= 0)), float(np.mean(draws >= 0))
    return min(1.0, max(2 * min(below, above), 1 / len(draws)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction for several tests (Holm, Scandinavian Journal of Statistics 1979), in the order of the values; NaN stays and counts for none."""
    known = sorted((value, place) for place, value in enumerate(p_values) if not math.isnan(value))
    corrected = [math.nan] * len(p_values)
    largest = 0.0
    for rank, (value, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * value))
        corrected[place] = largest
    return corrected


def _part(split: SplitScores, places: Sequence[int], budget: int) -> SplitScores:
    """The split scored on some of its samples at one budget."""
    if list(places) == list(range(len(split.samples))):
        return split
    answers: dict[int, list[GivenAnswer]] = {budget: [split.answers[budget][place] for place in places]}
    return score_splits(
        [split.samples[place] for place in places], answers, replace(split.rules, split_of=lambda sample: split.name)
    )[0]
