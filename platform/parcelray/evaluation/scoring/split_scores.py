"""Scores a benchmark's splits at every budget, with draws from which the interval of any derived number is computed.

The draws of one split at all its budgets, and of all splits of one benchmark, use the same drawn clusters. Differences,
ratios and means over them are therefore paired. If the score is a mean of independent values, they are bootstrap draws.
If it is not (F1, MME's points, circular accuracy), they are normal draws with the covariance of the delete-a-group
jackknife. CIDEr's values use the document frequencies of the whole set.
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
"""Corpus metrics whose score is the mean of the values once the statistics of the corpus are fixed."""
_JACKKNIFE_GROUPS = 100


@dataclass(frozen=True)
class Estimate:
    """A number with its bootstrap or jackknife draws."""

    value: float
    draws: NDArray[np.float64] = field(repr=False)
    n: int

    @property
    def interval(self) -> Interval:
        """The number with its 95 % confidence interval."""
        return percentile_interval(self.value, self.draws, self.n)

    @property
    def std_error(self) -> float:
        """Standard error: the standard deviation of the draws."""
        legal = self.draws[np.isfinite(self.draws)]
        return float(legal.std(ddof=1)) if len(legal) > 1 else math.nan


class GivenAnswer(NamedTuple):
    """One answer with the properties that scoring and adaptive budgets need."""

    text: str
    cut_off: bool = False
    num_new_tokens: int = 0
    mean_log_prob: float | None = None
    """See `Confidence`."""
    entropy: float | None = None
    """See `Confidence`."""


@dataclass(frozen=True)
class BudgetScore:
    """The score of a split at one budget."""

    estimate: Estimate
    """The score on the paper's scale."""
    totals: Mapping[str, float]
    """The score and its sub-scores, on the paper's scale."""
    values: tuple[float, ...]
    """Value of each sample, on the metric's own scale; NaN: cannot be scored."""
    unparsed: int
    """Number of answers that no parsing rule matches; they count as wrong."""
    empty: int
    """Number of answers without text."""
    cut_off: int
    """Number of answers that reached `max_new_tokens` without an end token."""
    mean_new_tokens: float
    """Mean length of an answer, tokens."""

    @property
    def unscored(self) -> int:
        """Number of samples that cannot be scored; they are left out of all means."""
        return sum(math.isnan(value) for value in self.values)


@dataclass(frozen=True)
class SplitScores:
    """The scores of a split at all budgets."""

    name: str
    benchmark: str
    family: str
    metric: str
    """Metric and variant, such as `anls:paper`; several, joined by ` + `, if the samples name different metrics."""
    additive: bool
    """Whether the score is a mean of independent values; only then can a part of the split be scored."""
    samples: tuple[Sample, ...]
    """The samples, without images."""
    answers: Mapping[int, tuple[GivenAnswer, ...]]
    """One answer per sample, by budget."""
    scores: Mapping[int, BudgetScore]
    """Score, by budget."""
    scale: float
    """Factor from the metric's own scale to the paper's scale."""
    rules: "ScoringRules"
    """The rules by which the split was scored."""


@dataclass(frozen=True)
class ScoringRules:
    """Scoring settings of a benchmark."""

    metric: str | None = None
    """Metric that replaces those of the samples; None: each sample's own."""
    split_of: Callable[[Sample], str] = lambda sample: sample.benchmark
    """Name of the split that a sample belongs to."""
    average_over: str | None = None
    """Metadata field over whose values the score is averaged, each value with the same weight; None: no averaging."""
    mask_decoder: Path | None = None
    """The .npz file that the metric `refseg_miou` needs."""
    whole: bool = True
    """Whether all rows of the data were evaluated."""
    problems: int = 0
    """Number of samples that could not be evaluated."""


def score_splits(
    samples: Sequence[Sample], answers: Mapping[int, Sequence[GivenAnswer]], rules: ScoringRules = ScoringRules()
) -> list[SplitScores]:
    """Scores the answers to one benchmark's samples.

    Args:
        samples: samples of one benchmark; their images are not needed.
        answers: by budget, one answer per sample.
        rules: scoring rules of the benchmark.

    Raises:
        UserError: a metric is unknown, or a sample lacks what its metric needs.
        ValueError: the numbers of answers and samples differ.
    """
    if rules.metric is not None:
        samples = [replace(sample, metric=rules.metric) for sample in samples]
    indices: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        indices.setdefault(rules.split_of(sample), []).append(index)
    splits = {name: _Split(name, [samples[index] for index in members], rules) for name, members in indices.items()}
    by_budget = {
        budget: _at_budget(
            {name: (split, [given[index] for index in indices[name]]) for name, split in splits.items()}, rules
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
            answers={budget: tuple(given[index] for index in indices[name]) for budget, given in answers.items()},
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
    """The samples of a split, and how their values are combined to a score."""

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

    def evaluate(self, texts: Sequence[str], indices: Sequence[int]) -> tuple[list[float], dict[str, float], int]:
        """Scores some of the samples.

        Returns:
            The values; the totals on the paper's scale, the main score first; and the number of unparsed answers.
        """
        members: dict[str, list[int]] = {}
        for index in indices:
            members.setdefault(self.groups[index], []).append(index)
        values = dict.fromkeys(indices, math.nan)
        totals: dict[str, list[float]] = {}
        unparsed = 0
        for group, inside in members.items():
            for result, owners in self._by_metric([texts[index] for index in inside], inside):
                values |= dict(zip(owners, result.values, strict=True))
                unparsed += result.unparsed
                for name, total in result.totals.items():
                    totals.setdefault(name, []).append(self.scale * total)
            if len(self.metrics) > 1:
                totals.setdefault(self.name, []).append(self.scale * _mean([values[index] for index in inside]))
            if group:
                totals[f"{self.rules.average_over}/{group}"] = [totals[self._main_name][-1]]
        means = {name: _mean(each) for name, each in totals.items()}
        return [values[index] for index in indices], {self._main_name: means[self._main_name]} | means, unparsed

    @property
    def _main_name(self) -> str:
        return self.metrics[0].name if len(self.metrics) == 1 else self.name

    def main_score(self, texts: Sequence[str], indices: Sequence[int]) -> float:
        return self.evaluate(texts, indices)[1][self._main_name]

    def _by_metric(self, texts: Sequence[str], indices: Sequence[int]) -> list[tuple[MetricResult, list[int]]]:
        found = by_metric([self.samples[index] for index in indices], texts, self.rules.mask_decoder)
        return [(result, [indices[index] for index in inside]) for inside, result in found.values()]


def _at_budget(splits: Mapping[str, tuple[_Split, list[GivenAnswer]]], rules: ScoringRules) -> dict[str, BudgetScore]:
    seed = zlib.crc32(next(iter(splits.values()))[0].samples[0].benchmark.encode()) if splits else 0
    scored = {
        name: split.evaluate([answer.text for answer in given], range(len(given)))
        for name, (split, given) in splits.items()
    }
    clusters: dict[str, tuple[list[float], list[str]]] = {}
    for name, (split, _) in splits.items():
        if split.is_mean:
            for index, value in enumerate(scored[name][0]):
                if not math.isnan(value):
                    values, owners = clusters.setdefault(f"{name}\0{split.groups[index]}", ([], []))
                    values.append(split.scale * value)
                    owners.append(_cluster(split.samples[index]))
    means = cluster_draws(clusters, seed) if clusters else {}
    scores = {}
    for name, (split, given) in splits.items():
        values, totals, unparsed = scored[name]
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
    """Draws normally around the score, with the variance of the jackknife (Shao and Tu, 1995, section 2.3).

    The same clusters get the same weights, so that the draws of different budgets are paired.
    """
    owners = [_cluster(sample) for sample in split.samples]
    names = sorted(set(owners))
    groups = min(_JACKKNIFE_GROUPS, len(names))
    if groups < 2:
        return np.full(DRAWS, np.nan)
    rng = np.random.default_rng(seed)
    group_of = dict(zip(names, rng.permutation(len(names)) % groups, strict=True))
    left_out = np.array(
        [
            split.main_score(texts, [index for index, owner in enumerate(owners) if group_of[owner] != group])
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
