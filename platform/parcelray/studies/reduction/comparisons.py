"""A method against another on the same questions, with many draws and one correction for all comparisons of a table."""

import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from parcelray.evaluation.scoring.aggregate import difference, mean_of
from parcelray.evaluation.scoring.intervals import Interval, shared_draws
from parcelray.evaluation.scoring.paired import holm, two_sided
from parcelray.evaluation.scoring.split_scores import Estimate, SplitScores
from parcelray.evaluation.scoring.summary import Summary

DRAWS = 10_000
"""So that p-values of a whole table can be corrected: the smallest is one draw's share."""

Floats = NDArray[np.float64]


class Question(NamedTuple):
    """Is a method better than the mean of some others at a budget?"""

    method: str
    num_visual_tokens: int
    found: Summary
    others: Sequence[Summary]


class Against(NamedTuple):
    """The answer."""

    method: str
    num_visual_tokens: int
    difference: Interval
    """Method minus the mean over the others, in points of the mean score over splits."""
    p_value: float
    """Two-sided, from the paired draws."""
    p_holm: float
    """Corrected for all comparisons of the table."""
    spread: float | None
    """Standard deviation of the others, points; None: there is one."""


def answer(questions: Sequence[Question]) -> list[Against]:
    """Answers all questions of one table."""
    gaps = gap_estimates(questions)
    p_values = [two_sided(gap) for gap in gaps]
    return [
        Against(
            each.method,
            each.num_visual_tokens,
            gap.interval,
            p_value,
            corrected,
            spread_of(each.others, each.num_visual_tokens),
        )
        for each, gap, p_value, corrected in zip(questions, gaps, p_values, holm(p_values), strict=True)
    ]


def spread_of(seeds: Sequence[Summary], budget: int) -> float | None:
    """Standard deviation of the score over seeds, points; None for one."""
    return float(np.std([each.mean_score(budget).value for each in seeds], ddof=1)) if len(seeds) > 1 else None


def gap_estimates(questions: Sequence[Question]) -> list[Estimate]:
    """Differences of the mean score over splits, each with `DRAWS` draws.

    Where a split's score is a mean of values, the draws are bootstrap draws of whole scenes, the same ones for all
    questions; elsewhere those that the scores have already are repeated.
    """
    gaps: list[list[Estimate]] = [[] for _ in questions]
    if not questions:
        return []
    for benchmark in dict.fromkeys(split.benchmark for split in questions[0].found.splits):
        members = [split.name for split in questions[0].found.splits if split.benchmark == benchmark]
        drawn = {name for name in members if is_mean_of_values(_split(questions[0].found, name))}
        if drawn:
            for gap, estimates in zip(
                gaps, _drawn_gaps(questions, [name for name in members if name in drawn], benchmark), strict=True
            ):
                gap += estimates
        for name in (name for name in members if name not in drawn):
            for gap, question in zip(gaps, questions, strict=True):
                gap.append(_known_gap(question, name))
    return [mean_of([each for each in members if each.n]) for members in gaps]


def is_mean_of_values(split: SplitScores) -> bool:
    """Whether the values of the samples are all that the score is made of."""
    return split.additive and split.rules.average_over is None


def clusters_of(split: SplitScores) -> list[str]:
    """What is drawn as a whole: the scene of each sample."""
    return [sample.scene or sample.id for sample in split.samples]


def _drawn_gaps(questions: Sequence[Question], names: Sequence[str], benchmark: str) -> list[list[Estimate]]:
    values_RN = np.array([np.concatenate([_gap_values(question, name) for name in names]) for question in questions])
    splits = [_split(questions[0].found, name) for name in names]
    groups = [split.name for split in splits for _ in split.samples]
    clusters = [cluster for split in splits for cluster in clusters_of(split)]
    draws = shared_draws(values_RN, groups, clusters, seed=zlib.crc32(benchmark.encode()), draws=DRAWS)
    inside = {name: np.array([group == name for group in groups]) for name in names}
    found = []
    for row, values_N in enumerate(values_RN):
        scored = {name: values_N[inside[name] & ~np.isnan(values_N)] for name in names}
        found.append(
            [
                Estimate(
                    float(scored[name].mean()) if len(scored[name]) else np.nan, draws[name][row], len(scored[name])
                )
                for name in names
            ]
        )
    return found


def _gap_values(question: Question, name: str) -> Floats:
    """Method minus the mean of the others of each sample, on the paper's scale."""
    split, others = _split(question.found, name), [_split(other, name) for other in question.others]
    assert all(
        [sample.id for sample in other.samples] == [sample.id for sample in split.samples] for other in others
    ), "the same questions"
    theirs = np.mean([other.scores[question.num_visual_tokens].values for other in others], axis=0)
    return np.asarray(
        split.scale * (np.array(split.scores[question.num_visual_tokens].values) - theirs), dtype=np.float64
    )


def _known_gap(question: Question, name: str) -> Estimate:
    budget = question.num_visual_tokens
    theirs = mean_of([_split(other, name).scores[budget].estimate for other in question.others])
    gap = difference(_split(question.found, name).scores[budget].estimate, theirs)
    return Estimate(gap.value, np.resize(gap.draws, DRAWS), gap.n)


def _split(summary: Summary, name: str) -> SplitScores:
    return next(split for split in summary.splits if split.name == name)


def table_rows(answers: Sequence[Against]) -> list[Mapping[str, str | int | float | None]]:
    """For a CSV file."""
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
        for each in answers
    ]
