"""From per-sample scores to what a paper prints: family scores, the overall score, retention, and the frontier over budgets.

Overall and retention are unweighted means over families, so that a family with more samples does not count more; retention is
100 x score / score of the uncompressed reference, per family (arXiv 2605.30126, Appendix E).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parcelray.evaluation.intervals import Interval, bootstrap_mean, cluster_draws, percentile_interval
from parcelray.evaluation.score import Score


@dataclass(frozen=True)
class FrontierPoint:
    """One method at one budget."""

    method: str
    num_visual_tokens: int
    overall: Interval
    retention: Interval | None
    """Percent of the reference; None for the baselines."""
    families: Mapping[str, Interval]
    unscored: int
    """Samples that could not be scored; they are in no mean."""


@dataclass(frozen=True)
class Frontier:
    """Scores of several methods over budgets, beside their reference."""

    points: tuple[FrontierPoint, ...]
    reference: str | None
    """The method that retention is measured against; None: no retention."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {"reference": self.reference, "points": [_point_to_dict(point) for point in self.points]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Frontier":
        """The inverse of `to_dict`."""
        return cls(points=tuple(_point_from_dict(point) for point in data["points"]), reference=data["reference"])


def frontier_point(method: str, num_visual_tokens: int, scores: Sequence[Score], reference: Sequence[Score] | None) -> FrontierPoint:
    """One method's scores at one budget, with retention where there is a reference on the same samples."""
    return FrontierPoint(
        method=method,
        num_visual_tokens=num_visual_tokens,
        overall=overall(scores),
        retention=retention(scores, reference) if reference is not None else None,
        families=family_scores(scores),
        unscored=unscored(scores),
    )


def family_scores(scores: Sequence[Score], seed: int = 0) -> dict[str, Interval]:
    """Mean score of each family with its cluster-bootstrap interval, families in order of appearance."""
    return {
        family: bootstrap_mean([score.value for score in members], [score.scene for score in members], seed) for family, members in _by_family(scores).items()
    }


def overall(scores: Sequence[Score], seed: int = 0) -> Interval:
    """Unweighted mean of the family means; scenes are drawn together over all families, which may share them."""
    families = _by_family(scores)
    means = [_mean(members) for members in families.values()]
    if not means:
        return Interval(math.nan, math.nan, math.nan, 0)
    draws = np.mean(list(_draws(families, seed).values()), axis=0)
    return percentile_interval(float(np.mean(means)), draws, sum(len(members) for members in families.values()))


def retention(scores: Sequence[Score], reference: Sequence[Score], seed: int = 0) -> Interval:
    """Percent of the reference's score that is kept: mean over families of 100 x score / reference, paired on the same samples.

    A family in which the reference scores 0 has no retention and is left out.
    """
    ours, theirs = _paired_families(scores, reference)
    if not ours:
        return Interval(math.nan, math.nan, math.nan, 0)
    values = [100 * _mean(members) / _mean(theirs[family]) for family, members in ours.items()]
    our_draws, their_draws = _draws(ours, seed), _draws(theirs, seed)
    draws = np.mean([100 * _ratio(our_draws[family], their_draws[family]) for family in ours], axis=0)
    return percentile_interval(float(np.mean(values)), draws, sum(len(members) for members in ours.values()))


def unscored(scores: Sequence[Score]) -> int:
    """Samples whose score is NaN."""
    return sum(math.isnan(score.value) for score in scores)


def _by_family(scores: Sequence[Score]) -> dict[str, list[Score]]:
    """The scored samples by family; where all are of one family (NLVR), by task."""
    one_family = len({score.family for score in scores}) == 1
    families: dict[str, list[Score]] = {}
    for score in scores:
        if not math.isnan(score.value):
            families.setdefault(score.task if one_family else score.family, []).append(score)
    return families


def _paired_families(scores: Sequence[Score], reference: Sequence[Score]) -> tuple[dict[str, list[Score]], dict[str, list[Score]]]:
    """The samples that both sides scored, by family and in the same order; without the families in which the reference scores 0."""
    ours: dict[str, list[Score]] = {}
    theirs: dict[str, list[Score]] = {}
    others = _by_family(reference)
    for family, members in _by_family(scores).items():
        shared = {score.sample_id: score for score in others.get(family, [])}
        kept = [score for score in members if score.sample_id in shared]
        if any(shared[score.sample_id].value for score in kept):
            ours[family], theirs[family] = kept, [shared[score.sample_id] for score in kept]
    return ours, theirs


def _mean(members: Sequence[Score]) -> float:
    return float(np.mean([score.value for score in members]))


def _draws(families: Mapping[str, Sequence[Score]], seed: int) -> dict[str, NDArray[np.float64]]:
    return cluster_draws({family: ([score.value for score in members], [score.scene for score in members]) for family, members in families.items()}, seed)


def _ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    ratios: NDArray[np.float64] = np.divide(above, below, out=np.full(len(below), np.nan), where=below > 0)
    return ratios


def _point_to_dict(point: FrontierPoint) -> dict[str, Any]:
    return {
        "method": point.method,
        "num_visual_tokens": point.num_visual_tokens,
        "overall": point.overall._asdict(),
        "retention": point.retention._asdict() if point.retention is not None else None,
        "families": {family: interval._asdict() for family, interval in point.families.items()},
        "unscored": point.unscored,
    }


def _point_from_dict(data: Mapping[str, Any]) -> FrontierPoint:
    return FrontierPoint(
        method=data["method"],
        num_visual_tokens=data["num_visual_tokens"],
        overall=Interval(**data["overall"]),
        retention=Interval(**data["retention"]) if data["retention"] is not None else None,
        families={family: Interval(**interval) for family, interval in data["families"].items()},
        unscored=data["unscored"],
    )
