"""Paired tests of methods on the same samples, with one Holm correction over all tests of a table."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from parcelray.evaluation.scoring.intervals import Interval
from parcelray.evaluation.scoring.paired import holm, paired_difference
from parcelray.evaluation.scoring.summary import Summary


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
    """Two-sided p-value, from the statistic of the interval."""
    p_holm: float
    """The p-value with Holm's correction over all tests of the table."""
    spread: float | None
    """Standard deviation of the baselines' scores, points; None for a single baseline."""


def run_tests(tests: Sequence[PairwiseTest]) -> list[PairwiseResult]:
    """Runs all tests of one table, which are corrected together."""
    gaps = [
        paired_difference(
            each.summary.splits,
            each.num_visual_tokens,
            [baseline.splits for baseline in each.baselines],
            each.num_visual_tokens,
        )
        for each in tests
    ]
    return [
        PairwiseResult(
            each.method,
            each.num_visual_tokens,
            gap.interval,
            gap.p_value,
            corrected,
            spread_of(each.baselines, each.num_visual_tokens),
        )
        for each, gap, corrected in zip(tests, gaps, holm([gap.p_value for gap in gaps]), strict=True)
    ]


def spread_of(seeds: Sequence[Summary], budget: int) -> float | None:
    """Returns the standard deviation of the score over seeds, points; None for one seed."""
    return float(np.std([each.mean_score(budget).value for each in seeds], ddof=1)) if len(seeds) > 1 else None


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
