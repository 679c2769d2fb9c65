"""Under which budget a family of questions, or a kind of them (text, documents, charts, spatial reasoning), breaks; with what is sure about it."""

import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from parcelray.datasets.sample import Sample
from parcelray.evaluation.scoring.aggregate import mean_of, retentions
from parcelray.evaluation.scoring.intervals import Floats, Interval, shared_draws
from parcelray.evaluation.scoring.split_scores import Estimate, SplitScores
from parcelray.evaluation.scoring.summary import Summary
from parcelray.studies.reduction.comparisons import clusters_of, is_mean_of_values

KEPT = 90.0
"""Percent of the full score below which a family is said to be broken."""
TEXT, DOCUMENTS, CHARTS, SPACE = "text", "documents", "charts", "spatial"
_KINDS = {
    TEXT: ("word", "number", "textvqa_val", "stvqa_val", "ocrvqa"),
    DOCUMENTS: ("form", "docvqa_val", "infovqa_val"),
    CHARTS: ("bar_tallest", "bar_height", "chartqa_human", "chartqa_augmented"),
    SPACE: ("relation", "corner"),
}
"""By task of the mini suite, or by benchmark."""
READS_TEXT = (TEXT, DOCUMENTS)
_DRAWS = 2000


class Break(NamedTuple):
    """Where a method breaks on some questions; budgets are those that were measured."""

    method: str
    subject: str
    """A family, or a kind of questions."""
    budget: int | None
    """The smallest from which on the score is at least `KEPT` percent of the full one; None: no measured one."""
    surely_kept: int | None
    """The same with the lower end of the 95 % interval: from here on it is sure."""
    surely_broken: int | None
    """The largest up to which even the upper end is below `KEPT` percent."""


class FinePoint(NamedTuple):
    """A method at a budget on one kind of questions."""

    method: str
    kind: str
    num_visual_tokens: int
    retention: Interval
    """Percent of the full score."""


def kind_of(sample: Sample) -> str:
    """The kind of a question; empty: none of those that are looked at."""
    return next((kind for kind, names in _KINDS.items() if sample.task in names or sample.benchmark in names), "")


def break_of(method: str, subject: str, kept: Mapping[int, Estimate]) -> Break:
    """Where retention, in percent, by budget, says that a method breaks."""
    intervals = {budget: estimate.interval for budget, estimate in kept.items()}
    return Break(
        method,
        subject,
        _from_here_on({budget: each.value >= KEPT for budget, each in intervals.items()}),
        _from_here_on({budget: each.low >= KEPT for budget, each in intervals.items()}),
        _up_to_here({budget: each.high < KEPT for budget, each in intervals.items()}),
    )


def family_breaks(name: str, summaries: Sequence[Summary], reference: Summary, full: int) -> list[Break]:
    """Of every split under a method, the mean over its seeds."""
    found = []
    for place, split in enumerate(summaries[0].splits):
        kept = {}
        for budget in summaries[0].budgets:
            over_seeds = [
                retentions([summary.splits[place]], budget, reference.splits, full).get(split.name)
                for summary in summaries
            ]
            known = [each for each in over_seeds if each is not None]
            if known:
                kept[budget] = mean_of(known)
        # Where the full model scores nothing there is nothing to break.
        if kept:
            found.append(break_of(name, split.name.rpartition("/")[2], kept))
    return found


def kinds_kept(
    methods: Mapping[str, Sequence[Summary]], reference: Summary, full: int
) -> dict[tuple[str, str], dict[int, Estimate]]:
    """Percent of the full score that each method keeps of each kind of questions: by method and kind, then by budget.

    Args:
        methods: their evaluations; several are seeds, of which the mean is taken.
        reference: the model with all tokens.
        full: how many those are.
    """
    rows = [(name, budget) for name, seeds in methods.items() for budget in seeds[0].budgets]
    found: dict[tuple[str, str], dict[int, Estimate]] = {}
    for benchmark in dict.fromkeys(split.benchmark for split in reference.splits):
        places = [
            place
            for place, split in enumerate(reference.splits)
            if split.benchmark == benchmark and is_mean_of_values(split)
        ]
        samples = [sample for place in places for sample in reference.splits[place].samples]
        kinds = [kind_of(sample) for sample in samples]
        if not any(kinds):
            continue
        base = [_values(reference.splits, places, full)]
        ours = [
            np.mean([_values(seed.splits, places, budget) for seed in methods[name]], axis=0) for name, budget in rows
        ]
        clusters = [cluster for place in places for cluster in clusters_of(reference.splits[place])]
        values_RN = np.array(base + ours)
        draws = shared_draws(values_RN, kinds, clusters, seed=zlib.crc32(benchmark.encode()), draws=_DRAWS)
        for kind in sorted(set(kinds) - {""}):
            inside = np.array([each == kind for each in kinds])
            means_R = np.nanmean(values_RN[:, inside], axis=1)
            if means_R[0] <= 0:
                continue
            for row, (name, budget) in enumerate(rows, start=1):
                share = np.divide(
                    draws[kind][row], draws[kind][0], out=np.full(_DRAWS, np.nan), where=draws[kind][0] > 0
                )
                # Benchmarks of one kind are averaged, as splits are.
                own = Estimate(float(100 * means_R[row] / means_R[0]), 100 * share, int(inside.sum()))
                before = found.setdefault((name, kind), {}).get(budget)
                found[name, kind][budget] = own if before is None else mean_of([before, own])
    return found


def _values(splits: Sequence[SplitScores], places: Sequence[int], budget: int) -> Floats:
    return np.concatenate(
        [splits[place].scale * np.array(splits[place].scores[budget].values, dtype=np.float64) for place in places]
    )


def _from_here_on(enough: Mapping[int, bool]) -> int | None:
    smallest = None
    for budget in sorted(enough, reverse=True):
        if not enough[budget]:
            break
        smallest = budget
    return smallest


def _up_to_here(broken: Mapping[int, bool]) -> int | None:
    largest = None
    for budget in sorted(broken):
        if not broken[budget]:
            break
        largest = budget
    return largest
