"""What every metric is: predictions and samples in, one value per sample and the totals out."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

from parcelray.datasets.sample import Sample
from parcelray.errors import UserError

T = TypeVar("T")


class MetricResult(NamedTuple):
    """What a metric says about a set of answers."""

    values: tuple[float, ...]
    """One per sample, 0 to 1 (CIDEr: 0 to 10); NaN: cannot be scored (counted, never silently 0)."""
    totals: dict[str, float]
    """The headline under the metric's own name first, then its sub-scores; all on the scale of `values` except MME's points."""
    unparsed: int
    """Answers that no rule could read; they are scored as wrong."""


class Metric(Protocol):
    """A named rule of scoring, in one named variant."""

    @property
    def name(self) -> str:
        """For example `vqa_accuracy`."""

    @property
    def variant(self) -> str:
        """For example `leave_one_out`; written into every result, because tools disagree."""

    @property
    def additive(self) -> bool:
        """True: the headline is the mean of the values, so subsets and a bootstrap over values are right.

        False: recompute it.
        """

    @property
    def paper_scale(self) -> float:
        """The headline times this is what papers print: 100, or 1 where the headline is in points."""

    def __call__(self, predictions: Sequence[str], samples: Sequence[Sample]) -> MetricResult:
        """Scores one answer per sample.

        Raises:
            UserError: a sample lacks metadata that the rule needs.
            ValueError: the two sequences differ in length.
        """


class Judgement(NamedTuple):
    """One answer's worth."""

    value: float
    parsed: bool = True


UNSCORED = Judgement(math.nan)
UNPARSED = Judgement(0.0, parsed=False)


def no_groups(sample: Sample) -> tuple[str, ...]:
    """No sub-scores."""
    return ()


@dataclass(frozen=True)
class PerSampleMetric:
    """A metric whose headline is the mean of independent values.

    Args:
        name: of the metric.
        variant: of the rule.
        judge: an answer's worth.
        groups: names of the sub-scores that a sample belongs to; each is a mean like the headline.
    """

    name: str
    variant: str
    judge: Callable[[str, Sample], Judgement]
    groups: Callable[[Sample], tuple[str, ...]] = no_groups
    additive: bool = True
    paper_scale: float = 100.0

    def __call__(self, predictions: Sequence[str], samples: Sequence[Sample]) -> MetricResult:
        judged = [self.judge(prediction, sample) for prediction, sample in zip(predictions, samples, strict=True)]
        values = tuple(judgement.value for judgement in judged)
        totals = {self.name: scored_mean(values)} | group_means(values, samples, self.groups)
        return MetricResult(values, totals, count_unparsed(judged))


def scored_mean(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN if there are none."""
    scored = [value for value in values if not math.isnan(value)]
    return math.fsum(scored) / len(scored) if scored else math.nan


def group_means(
    values: Sequence[float], samples: Sequence[Sample], groups: Callable[[Sample], tuple[str, ...]]
) -> dict[str, float]:
    """Mean of each group, groups in alphabetical order so that the order of samples does not matter."""
    members: dict[str, list[float]] = {}
    for value, sample in zip(values, samples, strict=True):
        for group in groups(sample):
            members.setdefault(group, []).append(value)
    return {group: scored_mean(members[group]) for group in sorted(members)}


def by_metadata(key: str) -> Callable[[Sample], tuple[str, ...]]:
    """Sub-scores `key/value` for samples whose metadata has the key."""

    def groups(sample: Sample) -> tuple[str, ...]:
        value = sample.metadata.get(key)
        return () if value is None else (f"{key}/{value}",)

    return groups


def needed(sample: Sample, key: str, kind: type[T], metric: str) -> T:
    """A sample's metadata under a key.

    Raises:
        UserError: it is missing, or of another type.
    """
    value = sample.metadata.get(key)
    if not isinstance(value, kind):
        raise UserError(
            f"The metric {metric} needs metadata {key!r} ({kind.__name__}) on every sample, but sample {sample.id!r} of"
            f" {sample.benchmark} has {value!r}; give the benchmark a column for {key!r}, or choose another metric."
        )
    return value


def count_unparsed(judged: Iterable[Judgement]) -> int:
    """Scored answers that no rule could read."""
    return sum(not judgement.parsed and not math.isnan(judgement.value) for judgement in judged)


def variants(metrics: Iterable[Metric]) -> Mapping[str, Metric]:
    """Metrics by variant, the default one first."""
    return {metric.variant: metric for metric in metrics}
