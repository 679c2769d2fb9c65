"""Scores a benchmark's splits at every budget, with their intervals and joint draws.

The draws of one split at all its budgets, and of all splits of one benchmark, are joint (see `estimate.py`). If the
score is a mean of independent values, its error is that of the mean over clusters. If it is not (F1, MME's points,
circular accuracy), its error is that of the delete-a-group jackknife. CIDEr's values use the document frequencies of
the whole set.
"""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from parcelray.benchmarks.metrics import metric as metric_of
from parcelray.benchmarks.metrics.base import Metric, MetricResult
from parcelray.datasets.sample import Sample
from parcelray.evaluation.scoring.estimate import (
    DRAWS,
    ClusteredValues,
    Estimate,
    estimate_means,
    joint_normals,
    mean_of,
    share_estimate,
    t_estimate,
)
from parcelray.evaluation.scoring.intervals import cluster_sums

_MEAN_WITH_FIXED_STATISTICS = ("cider",)
"""Corpus metrics whose score is the mean of the values once the statistics of the corpus are fixed."""
_JACKKNIFE_GROUPS = 100
_PERCENT = 100.0
"""Scale of scores that are shares; those in points (MME) have the scale 1."""


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
    seed = zlib.crc32(samples[0].benchmark.encode()) if samples else 0
    by_split = {
        name: {budget: tuple(given[index] for index in indices[name]) for budget, given in answers.items()}
        for name in splits
    }
    scored = {
        (name, budget): splits[name].evaluate([answer.text for answer in given], range(len(given)))
        for name, by_budget in by_split.items()
        for budget, given in by_budget.items()
    }
    estimates = _mean_estimates(splits, by_split, scored, seed)
    for name, split in splits.items():
        if not split.is_mean:
            texts = {budget: [answer.text for answer in given] for budget, given in by_split[name].items()}
            found = _jackknife_estimates(split, texts, {budget: scored[name, budget] for budget in answers}, seed)
            estimates |= {(name, budget): estimate for budget, estimate in found.items()}
    return [
        SplitScores(
            name=name,
            benchmark=split.samples[0].benchmark,
            family=split.samples[0].family,
            metric=" + ".join(dict.fromkeys(f"{each.name}:{each.variant}" for each in split.metrics)),
            additive=all(each.additive for each in split.metrics),
            samples=tuple(split.samples),
            answers=by_split[name],
            scores={
                budget: _budget_score(given, scored[name, budget], estimates[name, budget])
                for budget, given in by_split[name].items()
            },
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


class _Scored(NamedTuple):
    """The answers to some samples, scored."""

    values: list[float]
    """Value of each sample, on the metric's own scale."""
    totals: dict[str, float]
    """The score and its sub-scores on the paper's scale, the main score first."""
    unparsed: int


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

    def evaluate(self, texts: Sequence[str], indices: Sequence[int]) -> _Scored:
        """Scores some of the samples."""
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
        return _Scored(
            [values[index] for index in indices], {self._main_name: means[self._main_name]} | means, unparsed
        )

    @property
    def _main_name(self) -> str:
        return self.metrics[0].name if len(self.metrics) == 1 else self.name

    def main_score(self, texts: Sequence[str], indices: Sequence[int]) -> float:
        return self.evaluate(texts, indices).totals[self._main_name]

    def _by_metric(self, texts: Sequence[str], indices: Sequence[int]) -> list[tuple[MetricResult, list[int]]]:
        found = by_metric([self.samples[index] for index in indices], texts, self.rules.mask_decoder)
        return [(result, [indices[index] for index in inside]) for inside, result in found.values()]


def _budget_score(given: Sequence[GivenAnswer], scored: _Scored, estimate: Estimate) -> BudgetScore:
    return BudgetScore(
        estimate=estimate,
        totals=scored.totals,
        values=tuple(scored.values),
        unparsed=scored.unparsed,
        empty=sum(not answer.text.strip() for answer in given),
        cut_off=sum(answer.cut_off for answer in given),
        mean_new_tokens=_mean([answer.num_new_tokens for answer in given]),
    )


def _mean_estimates(
    splits: Mapping[str, _Split],
    by_split: Mapping[str, Mapping[int, Sequence[GivenAnswer]]],
    scored: Mapping[tuple[str, int], _Scored],
    seed: int,
) -> dict[tuple[str, int], Estimate]:
    """Estimates the scores that are means of values, all with the same draws: by split and budget."""
    rows: list[ClusteredValues] = []
    members: dict[tuple[str, int], list[int]] = {}
    for (name, budget), result in scored.items():
        split = splits[name]
        if not split.is_mean:
            continue
        inside: dict[str, list[int]] = {}
        for index, group in enumerate(split.groups):
            inside.setdefault(group, []).append(index)
        for indices in inside.values():
            members.setdefault((name, budget), []).append(len(rows))
            rows.append(
                ClusteredValues(
                    [result.values[index] for index in indices],
                    [cluster_of(split.samples[index]) for index in indices],
                    split.scale,
                    share=not any(metric.name in _MEAN_WITH_FIXED_STATISTICS for metric in split.metrics),
                    key=_key(split, budget, [by_split[name][budget][index].text for index in indices]),
                )
            )
    found = estimate_means(rows, seed) if rows else []
    return {
        key: replace(
            mean_of([found[row] for row in own if found[row].n]), value=next(iter(scored[key].totals.values()))
        )
        for key, own in members.items()
    }


def _jackknife_estimates(
    split: _Split, texts: Mapping[int, Sequence[str]], scored: Mapping[int, _Scored], seed: int
) -> dict[int, Estimate]:
    """Estimates a score that is not a mean, with the variance of the jackknife (Shao and Tu, 1995, section 2.3).

    The same clusters are left out at every budget, so that the draws of different budgets are paired.
    """
    owners = [cluster_of(sample) for sample in split.samples]
    names = sorted(set(owners))
    groups = min(_JACKKNIFE_GROUPS, len(names))
    if groups < 2:
        # Leaving out the only cluster leaves nothing, so the error is unknown.
        return {
            budget: Estimate(
                next(iter(result.totals.values())),
                np.full(DRAWS, np.nan),
                sum(not math.isnan(value) for value in result.values),
            )
            for budget, result in scored.items()
        }
    permutation = np.random.default_rng(seed).permutation(len(names))
    group_of = dict(zip(names, permutation % groups, strict=True))
    left_out_BG = np.array(
        [
            [
                split.main_score(given, [index for index, owner in enumerate(owners) if group_of[owner] != group])
                for group in range(groups)
            ]
            for given in texts.values()
        ],
        dtype=np.float64,
    )
    # A group may hold all scored samples; the error without it is then unknown.
    errors_BG = np.nan_to_num(left_out_BG.mean(axis=1, keepdims=True) - left_out_BG)
    _, whole, count = cluster_sums([0.0] * len(owners), owners)
    own = split.scale / count * math.sqrt(whole.prior) if split.scale == _PERCENT else 0.0
    keys = [_key(split, budget, given) for budget, given in texts.items()]
    normals_BW = joint_normals(errors_BG, np.full(len(errors_BG), own), seed, keys)
    found = {}
    for (budget, result), errors_G, normals_W in zip(scored.items(), errors_BG, normals_BW, strict=True):
        value = next(iter(result.totals.values()))
        _, design, n = cluster_sums(result.values, owners)
        variance = (groups - 1) / groups * float(np.square(errors_G).sum())
        freedom = min(groups - 1, design.freedom) if n else 0
        if not n or math.isnan(value):
            found[budget] = Estimate(value, np.full(DRAWS, np.nan), n)
        elif split.scale == _PERCENT:
            share = min(max(value / _PERCENT, 0.0), 1.0)
            effect = design.shrunk_effect(
                np.array(variance * (n / _PERCENT) ** 2), np.array(n * share * (1 - share)), design.mean_size
            )
            found[budget] = share_estimate(share, n / float(effect), freedom, normals_W, scale=_PERCENT, n=n)
        else:
            found[budget] = t_estimate(value, math.sqrt(variance), freedom, normals_W, n=n)
    return found


def _key(split: _Split, budget: int, texts: Sequence[str]) -> int:
    """Returns a number of the answers: the same answers get the same draws, answers of another budget others."""
    return zlib.crc32("\0".join([split.name, str(budget), *texts]).encode())


def cluster_of(sample: Sample) -> str:
    """Returns the cluster of a sample, within which samples are dependent: its scene, or the sample itself."""
    return sample.scene or sample.id


def _mean(values: Sequence[float]) -> float:
    legal = [value for value in values if not math.isnan(value)]
    return math.fsum(legal) / len(legal) if legal else math.nan
