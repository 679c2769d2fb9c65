"""The interface of metrics: predictions and samples in, one value per sample and the totals out."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

from parcelray.datasets.sample import Sample
from parcelray.errors import UserError

T = TypeVar("T")


class MetricResult(NamedTuple):
    """The scores of a set of predictions under one metric."""

    values: tuple[float, ...]
    """One value per sample, 0 to 1 (CIDEr: 0 to 10). NaN: the sample cannot be scored and is not counted as 0."""
    totals: dict[str, float]
    """The headline score under the metric's name, then the sub-scores, on the scale of `values` (MME: points)."""
    unparsed: int
    """Number of predictions that no rule could parse. They are scored as wrong."""


class Metric(Protocol):
    """A scoring rule in one variant."""

    @property
    def name(self) -> str:
        """Name of the metric, for example `vqa_accuracy`."""

    @property
    def variant(self) -> str:
        """Name of the variant, for example `leave_one_out`. Stored with every result, as tools score differently."""

    @property
    def additive(self) -> bool:
        """Whether the headline is the mean of the values.

        If it is, the mean over a subset or a bootstrap sample of the values is correct. If not, recompute the metric.
        """

    @property
    def paper_scale(self) -> float:
        """Factor from the headline to the number that papers print: 100, or 1 if the headline is in points."""

    def __call__(self, predictions: Sequence[str], samples: Sequence[Sample]) -> MetricResult:
        """Scores one prediction per sample.

        Raises:
            UserError: a sample lacks metadata that the rule needs.
            ValueError: the two sequences differ in length.
        """


class Judgement(NamedTuple):
    """The score of one prediction, and whether a rule could parse it."""

    value: float
    parsed: bool = True


UNSCORED = Judgement(math.nan)
UNPARSED = Judgement(0.0, parsed=False)


def no_groups(sample: Sample) -> tuple[str, ...]:
    """Returns no groups: the metric has no sub-scores."""
    return ()


@dataclass(frozen=True)
class PerSampleMetric:
    """A metric whose headline is the mean of independent values per sample.

    Args:
        name: name of the metric.
        variant: name of the variant.
        judge: scores one prediction.
        groups: names of the sub-scores that a sample belongs to. Each sub-score is a mean, like the headline.
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
    """Returns the mean of the values that are not NaN; NaN if there are none."""
    scored = [value for value in values if not math.isnan(value)]
    return math.fsum(scored) / len(scored) if scored else math.nan


def group_means(
    values: Sequence[float], samples: Sequence[Sample], groups: Callable[[Sample], tuple[str, ...]]
) -> dict[str, float]:
    """Returns the mean of each group, in alphabetical order so that the order of samples does not matter."""
    members: dict[str, list[float]] = {}
    for value, sample in zip(values, samples, strict=True):
        for group in groups(sample):
            members.setdefault(group, []).append(value)
    return {group: scored_mean(members[group]) for group in sorted(members)}


def by_metadata(key: str) -> Callable[[Sample], tuple[str, ...]]:
    """Makes a function that puts a sample into the group `key/value` if its metadata has the key."""

    def groups(sample: Sample) -> tuple[str, ...]:
        value = sample.metadata.get(key)
        return () if value is None else (f"{key}/{value}",)

    return groups


def needed(sample: Sample, key: str, kind: type[T], metric: str) -> T:
    """Returns required metadata of a sample.

    Raises:
        UserError: the value is missing, or has another type than `kind`.
    """
    value = sample.metadata.get(key)
    if not isinstance(value, kind):
        raise UserError(
            f"The metric {metric} needs metadata {key!r} ({kind.__name__}) on every sample, but sample {sample.id!r} of"
            f" {sample.benchmark} has {value!r}; give the benchmark a column for {key!r}, or choose another metric."
        )
    return value


def wrong_metadata(sample: Sample, key: str, legal: str, metric: str) -> UserError:
    """Returns the error for metadata of a sample that a metric cannot use.

    Args:
        sample: sample with the value.
        key: name of the metadata.
        legal: description of the legal values.
        metric: name of the metric.
    """
    return UserError(
        f"The metric {metric} cannot use metadata {key!r} of sample {sample.id!r} of {sample.benchmark}, which is"
        f" {sample.metadata.get(key)!r}; give {legal}, or choose another metric."
    )


def count_unparsed(judged: Iterable[Judgement]) -> int:
    """Returns the number of scored predictions that no rule could parse."""
    return sum(not judgement.parsed and not math.isnan(judgement.value) for judgement in judged)


def variants(metrics: Iterable[Metric]) -> Mapping[str, Metric]:
    """Returns the metrics by variant, the default variant first."""
    return {metric.variant: metric for metric in metrics}
