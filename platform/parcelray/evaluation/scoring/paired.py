"""Paired comparison of two models, or of two budgets, on the same samples."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from parcelray.errors import UserError
from parcelray.evaluation.scoring.estimate import difference, mean_of
from parcelray.evaluation.scoring.intervals import Interval, Stratum, cluster_sums, combine, difference_stratum
from parcelray.evaluation.scoring.split_scores import GivenAnswer, SplitScores, cluster_of, score_splits


class Comparison(NamedTuple):
    """Comparison of the first with the second on one split."""

    split: str
    metric: str
    first: Interval
    second: Interval
    difference: Interval
    """First minus second, paired."""
    p_value: float
    """Two-sided p-value of the null hypothesis that both scores are equal, from the statistic of the interval."""
    first_better: int
    """Number of samples on which the first has the higher value."""
    second_better: int
    """Number of samples on which the second has the higher value."""
    n: int
    """Number of samples that both have."""


class PairedDifference(NamedTuple):
    """The difference of two scores on the same samples."""

    interval: Interval
    """First minus second, on the paper's scale."""
    p_value: float
    """Two-sided p-value; below 0.05 exactly if the interval excludes 0."""


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
    gap = paired_difference([one], first_budget, [[other]], second_budget)
    pairs = list(zip(one.scores[first_budget].values, other.scores[second_budget].values, strict=True))
    return Comparison(
        split=first.name,
        metric=first.metric,
        first=one.scores[first_budget].estimate.interval,
        second=other.scores[second_budget].estimate.interval,
        difference=gap.interval,
        p_value=gap.p_value,
        first_better=sum(a > b for a, b in pairs),
        second_better=sum(b > a for a, b in pairs),
        n=len(shared),
    )


def paired_difference(
    splits: Sequence[SplitScores], budget: int, baselines: Sequence[Sequence[SplitScores]], baseline_budget: int
) -> PairedDifference:
    """Computes the mean score over splits minus that of the baselines, with its interval and test (`intervals.py`).

    Args:
        splits: the splits, on whose scores the mean is taken.
        budget: their budget, in visual tokens per image.
        baselines: for each baseline (such as a seed), the same splits with the same samples; their values are averaged.
        baseline_budget: budget of the baselines, in visual tokens per image.

    Returns:
        The difference over the samples that all have scored; NaN without any. If all answers are the same texts, as
        those of one model evaluated twice, it is exactly 0.
    """
    pairs = [
        pair
        for index, split in enumerate(splits)
        if (pair := _SplitPair(split, budget, [each[index] for each in baselines], baseline_budget)).n
    ]
    if not pairs:
        return PairedDifference(Interval(math.nan, math.nan, math.nan, 0), math.nan)
    n = sum(pair.n for pair in pairs)
    if all(pair.same_answers for pair in pairs):
        return PairedDifference(Interval(0.0, 0.0, 0.0, n), 1.0)
    strata: list[Stratum] = []
    for benchmark in dict.fromkeys(pair.split.benchmark for pair in pairs):
        members = [pair for pair in pairs if pair.split.benchmark == benchmark]
        means = [pair for pair in members if is_mean_of_values(pair.split)]
        strata += [_stratum_of_means(means, 1 / len(pairs))] if means else []
        strata += [pair.stratum(1 / len(pairs)) for pair in members if not is_mean_of_values(pair.split)]
    low, high, p_value = combine(strata)
    value = float(np.mean([pair.value for pair in pairs]))
    return PairedDifference(Interval(value, float(low), float(high), n), float(p_value))


def is_mean_of_values(split: SplitScores) -> bool:
    """Whether the score of a split is the plain mean of the values of its samples."""
    return split.additive and split.rules.average_over is None


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


class _SplitPair:
    """One split of a model and of its baselines."""

    def __init__(self, split: SplitScores, budget: int, baselines: Sequence[SplitScores], other: int) -> None:
        names = [sample.id for sample in split.samples]
        assert all([sample.id for sample in each.samples] == names for each in baselines), "the samples are the same"
        self.split = split
        texts = [answer.text for answer in split.answers[budget]]
        self.same_answers = all([answer.text for answer in each.answers[other]] == texts for each in baselines)
        self.differences_N = split.scale * (
            np.array(split.scores[budget].values) - np.mean([each.scores[other].values for each in baselines], axis=0)
        )
        self.gap = difference(
            split.scores[budget].estimate, mean_of([each.scores[other].estimate for each in baselines])
        )
        self.n = int((~np.isnan(self.differences_N)).sum())

    @property
    def clusters(self) -> list[str]:
        return [cluster_of(sample) for sample in self.split.samples]

    @property
    def value(self) -> float:
        return float(np.nanmean(self.differences_N)) if is_mean_of_values(self.split) else self.gap.value

    def stratum(self, weight: float) -> Stratum:
        """The difference of a score that is no mean, with the error of its joint draws."""
        _, design, _ = cluster_sums(self.differences_N.tolist(), self.clusters)
        variance = np.square(weight * np.array(self.gap.std_error))
        return Stratum(np.array(weight * self.gap.value), variance, design.freedom)


def _stratum_of_means(pairs: Sequence[_SplitPair], weight: float) -> Stratum:
    """The differences of the splits of one benchmark, which may share clusters."""
    index_of = {
        name: index for index, name in enumerate(dict.fromkeys(each for pair in pairs for each in pair.clusters))
    }
    sums_SK, counts_SK = np.zeros((len(pairs), len(index_of))), np.zeros((len(pairs), len(index_of)))
    squares_S, means_S = np.zeros(len(pairs)), np.array([pair.value for pair in pairs])
    for row, pair in enumerate(pairs):
        scored_N = ~np.isnan(pair.differences_N)
        owner_N = np.array([index_of[name] for name in pair.clusters])[scored_N]
        sums_SK[row] = np.bincount(owner_N, weights=pair.differences_N[scored_N], minlength=len(index_of))
        counts_SK[row] = np.bincount(owner_N, minlength=len(index_of))
        squares_S[row] = np.square(pair.differences_N[scored_N] - means_S[row]).sum()
    used_K = counts_SK.sum(axis=0) > 0
    return difference_stratum(
        means_S,
        sums_SK[:, used_K],
        squares_S,
        counts_SK[:, used_K],
        np.full(len(pairs), weight),
        np.array([pair.split.scale for pair in pairs]),
    )


def _part(split: SplitScores, indices: Sequence[int], budget: int) -> SplitScores:
    """Scores some of a split's samples again, at one budget."""
    if list(indices) == list(range(len(split.samples))):
        return split
    answers: dict[int, list[GivenAnswer]] = {budget: [split.answers[budget][index] for index in indices]}
    return score_splits(
        [split.samples[index] for index in indices], answers, replace(split.rules, split_of=lambda sample: split.name)
    )[0]
