"""Aggregates scores of splits: means over splits and families, retention, and the frontier over budgets.

A mean over splits is unweighted: a split with more samples does not count more. Retention is 100 x score / score of the
uncompressed reference. It is computed per split and then averaged, and is not the ratio of the mean scores (arXiv
2605.30126, Appendix E).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from parcelray.evaluation.scoring.estimate import Estimate, mean_of, ratio
from parcelray.evaluation.scoring.intervals import Interval
from parcelray.evaluation.scoring.split_scores import SplitScores


@dataclass(frozen=True)
class FrontierPoint:
    """One method at one budget; all numbers in percent."""

    method: str
    num_visual_tokens: int
    overall: Interval
    retention: Interval | None
    """Percent of the reference's score; None for the baselines."""
    families: Mapping[str, Interval]
    """Score by family, or by split if all splits are of one family."""
    unscored: int
    """Number of samples that could not be scored; they are left out of all means."""
    gflops: float | None = None
    """GFLOPs of one prefill with one image; None: unknown."""


@dataclass(frozen=True)
class Frontier:
    """Scores of several methods over budgets, with their reference."""

    points: tuple[FrontierPoint, ...]
    reference: str | None
    """The method that retention is relative to; None: there is no retention."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the frontier as JSON-serialisable values."""
        return {"reference": self.reference, "points": [_point_to_dict(point) for point in self.points]}


def frontier_point(
    method: str,
    num_visual_tokens: int,
    splits: Sequence[SplitScores],
    reference: tuple[Sequence[SplitScores], int] | None,
    *,
    shown: int | None = None,
) -> FrontierPoint:
    """Computes one method's scores at one budget, and its retention if there is a reference on the same samples.

    Args:
        method: name of the method.
        num_visual_tokens: the budget, in visual tokens per image.
        splits: splits that are scored at that budget.
        reference: the uncompressed model's splits and its budget; None: no retention.
        shown: the budget to report instead, for a baseline without a budget.
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
    """Returns the number of samples that could not be evaluated, over all benchmarks."""
    return sum({split.benchmark: split.rules.problems for split in splits}.values())


def estimates(splits: Sequence[SplitScores], num_visual_tokens: int) -> dict[str, Estimate]:
    """Returns each split's score at a budget, by the last part of its name; splits without scores are left out."""
    found = {split.name.rpartition("/")[2]: split.scores[num_visual_tokens].estimate for split in splits}
    return {name: estimate for name, estimate in found.items() if estimate.n}


def retentions(
    splits: Sequence[SplitScores], num_visual_tokens: int, reference: Sequence[SplitScores], reference_budget: int
) -> dict[str, Estimate]:
    """Computes the percentage of the reference's score that each split keeps.

    A split on which the reference scores 0 has no retention and is left out.

    Args:
        splits: splits that are scored at `num_visual_tokens`.
        num_visual_tokens: the budget, in visual tokens per image.
        reference: the same splits of the uncompressed model.
        reference_budget: budget of the reference, in visual tokens per image.
    """
    theirs = {
        split.name: split.scores[reference_budget].estimate for split in reference if reference_budget in split.scores
    }
    found = {}
    for split in splits:
        ours, base = split.scores[num_visual_tokens].estimate, theirs.get(split.name)
        if base is not None and base.value > 0 and ours.n:
            found[split.name] = retention_of(ours, base)
    return found


def retention_of(score: Estimate, reference: Estimate) -> Estimate:
    """Computes 100 x score / reference with paired draws; the reference must be above 0."""
    return ratio(score, reference, scale=100)


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
