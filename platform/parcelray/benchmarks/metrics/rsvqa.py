"""RSVQA: mean accuracy over the non-numeric question types (Lobry et al., TGRS 2020; PaliGemma's convention).

Exact match in lower case. The headline is the unweighted mean over the types `comp`, `presence` and, in the
low-resolution set, `rural_urban`. Sub-scores: each type, `overall` (mean over all questions) and `average` (mean over
all types, including counts and areas).

Metadata read: `question_type` (required).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from parcelray.benchmarks.metrics.base import MetricResult, count_unparsed, group_means, needed, scored_mean, variants
from parcelray.benchmarks.metrics.exact_match import matcher
from parcelray.datasets.sample import Sample

_TYPES = ("comp", "presence", "rural_urban")


@dataclass(frozen=True)
class Rsvqa:
    """Mean accuracy over question types."""

    name: str = "rsvqa"
    variant: str = "official"
    additive: bool = False
    paper_scale: float = 100.0

    def __call__(self, predictions: Sequence[str], samples: Sequence[Sample]) -> MetricResult:
        judge = matcher(str.lower)
        judged = [judge(prediction, sample) for prediction, sample in zip(predictions, samples, strict=True)]
        values = tuple(judgement.value for judgement in judged)
        types = group_means(values, samples, lambda sample: (needed(sample, "question_type", str, self.name),))
        headline = scored_mean(value for kind, value in types.items() if kind in _TYPES)
        totals = {self.name: headline, "overall": scored_mean(values), "average": scored_mean(types.values())}
        return MetricResult(
            values, totals | {f"question_type/{kind}": value for kind, value in types.items()}, count_unparsed(judged)
        )


RSVQA = variants((Rsvqa(),))
