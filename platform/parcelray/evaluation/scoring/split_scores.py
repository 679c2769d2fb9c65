"""Scores of a benchmark's splits at every budget, each with the draws that give every derived number its interval.

The draws of one split at all its budgets, and of all splits of one benchmark, come from the same clusters drawn
together, so differences, ratios and means over them are paired as they must be. Where the score is a mean of
independent values, they are bootstrap draws; where it is not (F1, MME's points, circular accuracy), they are normal
draws with the covariance of the delete-a-group jackknife. CIDEr's values are taken with the document frequencies of the
whole set.
"""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from parcelray.benchmarks.metrics import metric as metric_of
from parcelray.benchmarks.metrics.base import Metric, MetricResult
from parcelray.datasets.sample import Sample
from parcelray.evaluation.scoring.intervals import DRAWS, Interval, cluster_draws, percentile_interval

_MEAN_WITH_FIXED_STATISTICS = ("cider",)
"""Metrics of a corpus whose score is the mean of the values once the corpus's statistics are fixed."""
_JACKKNIFE_GROUPS = 100


@dataclass(frozen=True)
class Estimate:
    """A number with its draws."""

    value: float
    draws: NDArray[np.float64] = field(repr=False)
    n: int

    @property
    def interval(self) -> Interval:
        """With its 95 % interval."""
        return percentile_interval(self.value, self.draws, self.n)

    @property
    def std_error(self) -> float:
        """Standard deviation of the draws."""
        legal = self.draws[np.isfinite(self.draws)]
        return float(legal.std(ddof=1)) if len(legal) > 1 else math.nan


class GivenAnswer(NamedTuple):
    """One answer, as scoring needs it."""

    text: str
    cut_off: bool = False
    num_new_tokens: int = 0
    mean_log_prob: float | None = None
    """See `Confidence`."""
    entropy: float | None = None
    """See `Confidence`."""


@dataclass(frozen=True)
class BudgetScore:
    """A split at one budget."""

    estimate: Estimate
    """The score on the paper's scale."""
    totals: Mapping[str, float]
    """The score and its sub-scores, on the paper's scale."""
    values: tuple[float, ...]
    """Of each sample, on the metric's own scale; NaN: cannot be scored."""
    unparsed: int
    """Answers that no rule could read; they are wrong."""
    empty: int
    """Answers without any text."""
    cut_off: int
    """Answers that reached the longest length without an end."""
    mean_new_tokens: float
    """Length of an answer, tokens."""

    @property
    def unscored(self) -> int:
        """Samples that cannot be scored; they are in no mean."""
        return sum(math.isnan(value) for value in self.values)


@dataclass(frozen=True)
class SplitScores:
    """One split at all budgets."""

    name: str
    benchmark: str
    family: str
    metric: str
    """Metric and variant, such as `anls:strict`; several where the samples name their own."""
    additive: bool
    """Whether the score is a mean of independent values: only then do scores of a part of the split mean anything."""
    samples: tuple[Sample, ...]
    """Without images."""
    answers: Mapping[int, tuple[GivenAnswer, ...]]
    """By budget, one for each sample."""
    scores: Mapping[int, BudgetScore]
    """By budget."""
    scale: float
    """From the metric's own scale to the paper's."""
    rules: "ScoringRules"
    """By which it was scored."""


@dataclass(frozen=True)
class ScoringRules:
    """How a benchmark is scored."""

    metric: str | None = None
    """Instead of those that the samples name."""
    split_of: Callable[[Sample], str] = lambda sample: sample.benchmark
    """Name of the split that a sample belongs to."""
    average_over: str | None = None
    """Metadata whose values weigh alike."""
    mask_decoder: Path | None = None
    """File that `refseg_miou` needs."""
    whole: bool = True
    """Whether all rows were asked."""
    problems: int = 0
    """Questions that could not be asked."""


def score_splits(
    samples: Sequence[Sample], answers: Mapping[int, Sequence[GivenAnswer]], rules: ScoringRules = ScoringRules()
) -> list[SplitScores]:
    """Scores the answers to one benchmark's samples.

    Args:
        samples: of one benchmark; their images are not needed.
        answers: by budget, one answer for each sample.
        rules: of the benchmark.

    Raises:
        UserError: a metric is unknown, or a sample lacks what it needs.
        ValueError: the numbers of answers and samples differ.
    """
    if rules.metric is not None:
        samples = [replace(sample, metric=rules.metric) for sample in samples]
    places: dict[str, list[int]] = {}
    for place, sample in enumerate(samples):
        places.setdefault(rules.split_of(sample), []).append(place)
    splits = {name: _Split(name, [samples[place] for place in members], rules) for name, members in places.items()}
    by_budget = {
        budget: _at_budget(
            {name: (split, [given[place] for place in places[name]]) for name, split in splits.items()}, rules
        )
        for budget, given in answers.items()
    }
    return [
        SplitScores(
            name=name,
            benchmark=split.samples[0].benchmark,
            family=split.samples[0].family,
            metric=" + ".join(dict.fromkeys(f"{each.name}:{each.variant}" for each in split.metrics)),
            additive=all(each.additive for each in split.metrics),
            samples=tuple(split.samples),
            answers={budget: tuple(given[place] for place in places[name]) for budget, given in answers.items()},
            scores={budget: scores[name] for budget, scores in by_budget.items()},
            scale=split.scale,
            rules=rules,
        )
        for name, split in splits.items()
    ]


def score(samples: Sequence[Sample], predictions: Sequence[str], *, mask_decoder: Path | None = None) -> list[float]:
    """Scores each prediction by its sample's metric: 0 to 1 (CIDEr: 0 to 10); NaN where it cannot be scored.

    The values of a corpus metric (CIDEr) hold for exactly these samples: the score of a whole set is not the mean of
    the values of its parts.

    Args:
        samples: the evaluated samples.
        predictions: one answer per sample, in the same order.
        mask_decoder: the .npz file that `refseg_miou` needs.

    Raises:
        UserError: a metric is unknown, or a sample lacks what its metric needs.
        ValueError: the two sequences differ in length.
    """
    values = [0.0] * len(samples)
    for indices, result in by_metric(samples, predictions, mask_decoder).values():
        for index, value in zip(indices, result.values, strict=True):
            values[index] = value
    return values


def by_metric(
    samples: Sequence[Sample], predictions: Sequence[str], mask_decoder: Path | None
) -> dict[str, tuple[list[int], MetricResult]]:
    """Calls every metric that the samples name once; returns the indices of its samples and its result, by metric."""
    if len(samples) != len(predictions):
        raise ValueError(f"{len(predictions)} predictions for {len(samples)} samples; give one prediction per sample")
    indices: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        indices.setdefault(sample.metric, []).append(index)
    return {
        name: (
            members,
            metric_of(name, mask_decoder=mask_decoder)(
                [predictions[index] for index in members], [samples[index] for index in members]
            ),
        )
        for name, members in indices.items()
    }


class _Split:
    """One split's samples, and how their values make a score."""

    def __init__(self, name: str, samples: list[Sample], rules: ScoringRules) -> None:
        self.name = name
        self.samples = samples
        self.rules = rules
        self.metrics: list[Metric] = [
            metric_of(each, mask_decoder=rules.mask_decoder)
            for each in dict.fromkeys(sample.metric for sample in samples)
        ]
        self.groups = [
            str(sample.metadata.get(rules.average_over, "")) if rules.average_over else "" for sample in samples
        ]
        self.scale = self.metrics[0].paper_scale

    @property
    def is_mean(self) -> bool:
        return all(each.additive or each.name in _MEAN_WITH_FIXED_STATISTICS for each in self.metrics)

    def judge(self, texts: Sequence[str], places: Sequence[int]) -> tuple[list[float], dict[str, float], int]:
        """Values, totals on the paper's scale and unread answers of some of the samples, the headline under the split's name."""
        members: dict[str, list[int]] = {}
        for place in places:
            members.setdefault(self.groups[place], []).append(place)
        values = dict.fromkeys(places, math.nan)
        totals: dict[str, list[float]] = {}
        unparsed = 0
        for group, inside in members.items():
            for result, owners in self._by_metric([texts[place] for place in inside], inside):
                values |= dict(zip(owners, result.values, strict=True))
                unparsed += result.unparsed
                for name, total in result.totals.items():
                    totals.setdefault(name, []).append(self.scale * total)
            if len(self.metrics) > 1:
                totals.setdefault(self.name, []).append(self.scale * _mean([values[place] for place in inside]))
            if group:
                totals[f"{self.rules.average_over}/{group}"] = [totals[self._headline][-1]]
        means = {name: _mean(each) for name, each in totals.items()}
        return [values[place] for place in places], {self._headline: means[self._headline]} | means, unparsed

    @property
    def _headline(self) -> str:
        return self.metrics[0].name if len(self.metrics) == 1 else self.name

    def headline(self, texts: Sequence[str], places: Sequence[int]) -> float:
        return self.judge(texts, places)[1][self._headline]

    def _by_metric(self, texts: Sequence[str], places: Sequence[int]) -> list[tuple[MetricResult, list[int]]]:
        found = by_metric([self.samples[place] for place in places], texts, self.rules.mask_decoder)
        return [(result, [places[index] for index in inside]) for inside, result in found.values()]


def _at_budget(splits: Mapping[str, tuple[_Split, list[GivenAnswer]]], rules: ScoringRules) -> dict[str, BudgetScore]:
    seed = zlib.crc32(next(iter(splits.values()))[0].samples[0].benchmark.encode()) if splits else 0
    judged = {
        name: split.judge([answer.text for answer in given], range(len(given)))
        for name, (split, given) in splits.items()
    }
    clusters: dict[str, tuple[list[float], list[str]]] = {}
    for name, (split, _) in splits.items():
        if split.is_mean:
            for place, value in enumerate(judged[name][0]):
                if not math.isnan(value):
                    values, owners = clusters.setdefault(f"{name}\0{split.groups[place]}", ([], []))
                    values.append(split.scale * value)
                    owners.append(_cluster(split.samples[place]))
    means = cluster_draws(clusters, seed) if clusters else {}
    scores = {}
    for name, (split, given) in splits.items():
        values, totals, unparsed = judged[name]
        value = next(iter(totals.values()))
        if split.is_mean:
            own = [draws for key, draws in means.items() if key.startswith(f"{name}\0")]
            draws = np.mean(own, axis=0) if own else np.full(DRAWS, np.nan)
        else:
            draws = _jackknife_draws(split, [answer.text for answer in given], value, seed)
        scores[name] = BudgetScore(
            estimate=Estimate(value, draws, sum(not math.isnan(each) for each in values)),
            totals=totals,
            values=tuple(values),
            unparsed=unparsed,
            empty=sum(not answer.text.strip() for answer in given),
            cut_off=sum(answer.cut_off for answer in given),
            mean_new_tokens=_mean([answer.num_new_tokens for answer in given]),
        )
    return scores


def _jackknife_draws(split: _Split, texts: Sequence[str], value: float, seed: int) -> NDArray[np.float64]:
    """Normal draws around the score with the jackknife's variance, the same weights for the same clusters (Shao and Tu, 1995, section 2.3)."""
    owners = [_cluster(sample) for sample in split.samples]
    names = sorted(set(owners))
    groups = min(_JACKKNIFE_GROUPS, len(names))
    if groups < 2:
        return np.full(DRAWS, np.nan)
    rng = np.random.default_rng(seed)
    group_of = dict(zip(names, rng.permutation(len(names)) % groups, strict=True))
    left_out = np.array(
        [
            split.headline(texts, [place for place, owner in enumerate(owners) if group_of[owner] != group])
            for group in range(groups)
        ],
        dtype=np.float64,
    )
    weights = rng.standard_normal((DRAWS, groups))
    draws: NDArray[np.float64] = value + math.sqrt((groups - 1) / groups) * weights @ (left_out - left_out.mean())
    return draws


def _cluster(sample: Sample) -> str:
    return sample.scene or sample.id


def _mean(values: Sequence[float]) -> float:
    legal = [value for value in values if not math.isnan(value)]
    return math.fsum(legal) / len(legal) if legal else math.nan
