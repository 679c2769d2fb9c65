"""From the scores of splits to what a paper prints: means over splits and families, retention, and the frontier over budgets.

A mean over splits is unweighted, so that a split with more samples does not count more; retention is 100 x score /
score of the uncompressed reference for each split, and their mean is taken, not the ratio of the means (arXiv
2605.30126, Appendix E).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parcelray.evaluation.scoring.intervals import Interval
from parcelray.evaluation.scoring.split_scores import Estimate, SplitScores


@dataclass(frozen=True)
class FrontierPoint:
    """One method at one budget; all numbers in percent."""

    method: str
    num_visual_tokens: int
    overall: Interval
    retention: Interval | None
    """Percent of the reference; None for the baselines."""
    families: Mapping[str, Interval]
    """By family, or by split where all are of one family."""
    unscored: int
    """Samples that could not be scored; they are in no mean."""
    gflops: float | None = None
    """Of one prefill of one image, where it is known."""


@dataclass(frozen=True)
class Frontier:
    """Scores of several methods over budgets, beside their reference."""

    points: tuple[FrontierPoint, ...]
    reference: str | None
    """The method that retention is measured against; None: no retention."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {"reference": self.reference, "points": [_point_to_dict(point) for point in self.points]}


def frontier_point(
    method: str,
    num_visual_tokens: int,
    splits: Sequence[SplitScores],
    reference: tuple[Sequence[SplitScores], int] | None,
    *,
    shown: int | None = None,
) -> FrontierPoint:
    """One method's scores at one budget, with retention where there is a reference on the same samples.

    Args:
        method: its name.
        num_visual_tokens: the budget whose scores are taken.
        splits: scored at that budget.
        reference: the uncompressed model's splits and its budget.
        shown: the budget to report instead, for a baseline that has none.
    """
    scores = estimates(splits, num_visual_tokens)
    kept = retentions(splits, num_visual_tokens, *reference) if reference is not None else {}
    return FrontierPoint(
        method=method,
        num_visual_tokens=num_visual_tokens if shown is None else shown,
        overall=mean_of(list(scores.values())).interval,
        retention=mean_of(list(kept.values())).interval if reference is not None else None,
        families={name: estimate.interval for name, estimate in scores.items()},
        unscored=sum(split.scores[num_visual_tokens].unscored for split in splits) + unevaluated(splits),
    )


def unevaluated(splits: Sequence[SplitScores]) -> int:
    """Questions that could not be asked, over all benchmarks."""
    return sum({split.benchmark: split.rules.problems for split in splits}.values())


def estimates(splits: Sequence[SplitScores], num_visual_tokens: int) -> dict[str, Estimate]:
    """Each split's score at a budget, by the last part of its name; splits that nothing could be scored on are left out."""
    found = {split.name.rpartition("/")[2]: split.scores[num_visual_tokens].estimate for split in splits}
    return {name: estimate for name, estimate in found.items() if estimate.n}


def retentions(
    splits: Sequence[SplitScores], num_visual_tokens: int, reference: Sequence[SplitScores], reference_budget: int
) -> dict[str, Estimate]:
    """Percent of the reference's score that each split keeps; a split where the reference scores 0 has no retention and is left out.

    Args:
        splits: scored at `num_visual_tokens`.
        num_visual_tokens: the budget.
        reference: the same splits of the uncompressed model.
        reference_budget: its budget.
    """
    theirs = {
        split.name: split.scores[reference_budget].estimate for split in reference if reference_budget in split.scores
    }
    found = {}
    for split in splits:
        ours, base = split.scores[num_visual_tokens].estimate, theirs.get(split.name)
        if base is not None and base.value > 0 and ours.n:
            draws = np.divide(ours.draws, base.draws, out=np.full(len(ours.draws), np.nan), where=base.draws > 0)
            found[split.name] = Estimate(100 * ours.value / base.value, 100 * draws, ours.n)
    return found


def mean_of(members: Sequence[Estimate]) -> Estimate:
    """Unweighted mean of estimates whose draws belong together."""
    if not members:
        return Estimate(math.nan, np.full(1, np.nan), 0)
    return Estimate(
        float(np.mean([member.value for member in members])),
        np.mean([member.draws for member in members], axis=0),
        sum(member.n for member in members),
    )


def difference(first: Estimate, second: Estimate) -> Estimate:
    """First minus second, paired."""
    return Estimate(first.value - second.value, first.draws - second.draws, min(first.n, second.n))


def _point_to_dict(point: FrontierPoint) -> dict[str, Any]:
    return {
        "method": point.method,
        "num_visual_tokens": point.num_visual_tokens,
        "overall": point.overall._asdict(),
        "retention": point.retention._asdict() if point.retention is not None else None,
        "families": {family: interval._asdict() for family, interval in point.families.items()},
        "unscored": point.unscored,
        "gflops": point.gflops,
    }
