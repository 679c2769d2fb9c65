"""Paired tests of methods on the same samples, with one Holm correction over all tests of a table."""

import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from parcelray.evaluation.scoring.aggregate import difference, mean_of
from parcelray.evaluation.scoring.intervals import Interval, shared_draws
from parcelray.evaluation.scoring.paired import holm, two_sided
from parcelray.evaluation.scoring.split_scores import Estimate, SplitScores
from parcelray.evaluation.scoring.summary import Summary

DRAWS = 10_000
"""Number of bootstrap draws. The smallest p-value is 1 / DRAWS; it must be small enough for Holm's correction."""

Floats = NDArray[np.float64]


class PairwiseTest(NamedTuple):
    """A test whether a method is better than the mean of some baselines at one budget."""

    method: str
    num_visual_tokens: int
    summary: Summary
    """Evaluation of the method."""
    baselines: Sequence[Summary]
    """Evaluations of the baselines, for example one per seed of random sampling."""


class PairwiseResult(NamedTuple):
    """The result of a pairwise test."""

    method: str
    num_visual_tokens: int
    difference: Interval
    """Method minus the mean over the baselines, in points of the mean score over splits."""
    p_value: float
    """Two-sided p-value, from the paired draws."""
    p_holm: float
    """The p-value with Holm's correction over all tests of the table."""
    spread: float | None
    """Standard deviation of the baselines' scores, points; None for a single baseline."""


def run_tests(tests: Sequence[PairwiseTest]) -> list[PairwiseResult]:
    """Runs all tests of one table, which are corrected together."""
    gaps = gap_estimates(tests)
    p_values = [two_sided(gap) for gap in gaps]
    return [
        PairwiseResult(
            each.method,
            each.num_visual_tokens,
            gap.interval,
            p_value,
            corrected,
            spread_of(each.baselines, each.num_visual_tokens),
        )
        for each, gap, p_value, corrected in zip(tests, gaps, p_values, holm(p_values), strict=True)
    ]


def spread_of(seeds: Sequence[Summary], budget: int) -> float | None:
    """Returns the standard deviation of the score over seeds, points; None for one seed."""
    return float(np.std([each.mean_score(budget).value for each in seeds], ddof=1)) if len(seeds) > 1 else None


def gap_estimates(tests: Sequence[PairwiseTest]) -> list[Estimate]:
    """Returns the difference of the mean score over splits for each test, with `DRAWS` draws.

    If the score of a split is a mean over samples, whole scenes are bootstrapped, with the same draws for all tests.
    Otherwise the draws that belong to the scores are repeated.
    """
    gaps: list[list[Estimate]] = [[] for _ in tests]
    if not tests:
        return []
    for benchmark in dict.fromkeys(split.benchmark for split in tests[0].summary.splits):
        members = [split.name for split in tests[0].summary.splits if split.benchmark == benchmark]
        drawn = {name for name in members if is_mean_of_values(_split(tests[0].summary, name))}
        if drawn:
            for gap, estimates in zip(
                gaps, _drawn_gaps(tests, [name for name in members if name in drawn], benchmark), strict=True
            ):
                gap += estimates
        for name in (name for name in members if name not in drawn):
            for gap, test in zip(gaps, tests, strict=True):
                gap.append(_repeated_gap(test, name))
    return [mean_of([each for each in members if each.n]) for members in gaps]


def is_mean_of_values(split: SplitScores) -> bool:
    """Whether the score of a split is the plain mean of the values of its samples."""
    return split.additive and split.rules.average_over is None


def clusters_of(split: SplitScores) -> list[str]:
    """Returns the bootstrap cluster of each sample: its scene, or the sample itself."""
    return [sample.scene or sample.id for sample in split.samples]


def _drawn_gaps(tests: Sequence[PairwiseTest], names: Sequence[str], benchmark: str) -> list[list[Estimate]]:
    values_RN = np.array([np.concatenate([_gap_values(test, name) for name in names]) for test in tests])
    splits = [_split(tests[0].summary, name) for name in names]
    groups = [split.name for split in splits for _ in split.samples]
    clusters = [cluster for split in splits for cluster in clusters_of(split)]
    draws = shared_draws(values_RN, groups, clusters, seed=zlib.crc32(benchmark.encode()), draws=DRAWS)
    inside = {name: np.array([group == name for group in groups]) for name in names}
    gaps = []
    for row, values_N in enumerate(values_RN):
        scored = {name: values_N[inside[name] & ~np.isnan(values_N)] for name in names}
        gaps.append(
            [
                Estimate(
                    float(scored[name].mean()) if len(scored[name]) else np.nan, draws[name][row], len(scored[name])
                )
                for name in names
            ]
        )
    return gaps


def _gap_values(test: PairwiseTest, name: str) -> Floats:
    """Returns the method's value minus the mean of the baselines' values for each sample, on the paper's scale."""
    split, baselines = _split(test.summary, name), [_split(each, name) for each in test.baselines]
    assert all(
        [sample.id for sample in each.samples] == [sample.id for sample in split.samples] for each in baselines
    ), "the baselines have the same samples"
    mean_N = np.mean([each.scores[test.num_visual_tokens].values for each in baselines], axis=0)
    return np.asarray(split.scale * (np.array(split.scores[test.num_visual_tokens].values) - mean_N), dtype=np.float64)


def _repeated_gap(test: PairwiseTest, name: str) -> Estimate:
    budget = test.num_visual_tokens
    baseline = mean_of([_split(each, name).scores[budget].estimate for each in test.baselines])
    gap = difference(_split(test.summary, name).scores[budget].estimate, baseline)
    return Estimate(gap.value, np.resize(gap.draws, DRAWS), gap.n)


def _split(summary: Summary, name: str) -> SplitScores:
    return next(split for split in summary.splits if split.name == name)


def table_rows(results: Sequence[PairwiseResult]) -> list[Mapping[str, str | int | float | None]]:
    """Returns the rows of a CSV file, one per test."""
    return [
        {
            "method": each.method,
            "num_visual_tokens": each.num_visual_tokens,
            "difference": each.difference.value,
            "low": each.difference.low,
            "high": each.difference.high,
            "p_value": each.p_value,
            "p_holm": each.p_holm,
            "sd_over_seeds": each.spread,
        }
        for each in results
    ]
