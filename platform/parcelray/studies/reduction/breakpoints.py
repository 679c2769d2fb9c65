"""Breakpoints: the budget below which a method loses too much score on a benchmark family or a kind of question.

The kinds are text, documents, charts and spatial reasoning.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from parcelray.datasets.sample import Sample
from parcelray.evaluation.scoring.aggregate import retention_of, retentions
from parcelray.evaluation.scoring.estimate import ClusteredValues, Estimate, estimate_means, mean_of
from parcelray.evaluation.scoring.intervals import Floats, Interval
from parcelray.evaluation.scoring.paired import is_mean_of_values
from parcelray.evaluation.scoring.split_scores import SplitScores, cluster_of
from parcelray.evaluation.scoring.summary import Summary

KEPT = 90.0
"""Retention below which a method counts as broken, percent of the full score."""
TEXT, DOCUMENTS, CHARTS, SPACE = "text", "documents", "charts", "spatial"
_KINDS = {
    TEXT: ("word", "number", "textvqa_val", "stvqa_val", "ocrvqa"),
    DOCUMENTS: ("form", "docvqa_val", "infovqa_val"),
    CHARTS: ("bar_tallest", "bar_height", "chartqa_human", "chartqa_augmented"),
    SPACE: ("relation", "corner"),
}
"""Tasks of the mini suite and names of benchmarks, by kind of question."""
READS_TEXT = (TEXT, DOCUMENTS)


class Breakpoint(NamedTuple):
    """The budget at which a method breaks on some questions; all budgets are measured ones."""

    method: str
    subject: str
    """A benchmark family, or a kind of question."""
    budget: int | None
    """Smallest budget from which on retention is at least `KEPT` percent; None if there is none."""
    surely_kept: int | None
    """Smallest budget from which on the lower end of the 95 % interval is at least `KEPT` percent."""
    surely_broken: int | None
    """Largest budget up to which the upper end of the 95 % interval is below `KEPT` percent."""


class FinePoint(NamedTuple):
    """The retention of a method at one budget on one kind of question."""

    method: str
    kind: str
    num_visual_tokens: int
    retention: Interval
    """Percent of the full score."""


def kind_of(sample: Sample) -> str:
    """Returns the kind of a sample's question; "" if it is none of the four kinds."""
    return next((kind for kind, names in _KINDS.items() if sample.task in names or sample.benchmark in names), "")


def breakpoint_of(method: str, subject: str, kept: Mapping[int, Estimate]) -> Breakpoint:
    """Returns the breakpoint of a method.

    Args:
        method: name of the method.
        subject: a benchmark family, or a kind of question.
        kept: retention by budget, percent.
    """
    intervals = {budget: estimate.interval for budget, estimate in kept.items()}
    return Breakpoint(
        method,
        subject,
        _smallest_from_which_all({budget: each.value >= KEPT for budget, each in intervals.items()}),
        _smallest_from_which_all({budget: each.low >= KEPT for budget, each in intervals.items()}),
        _largest_up_to_which_all({budget: each.high < KEPT for budget, each in intervals.items()}),
    )


def family_breakpoints(name: str, summaries: Sequence[Summary], reference: Summary, full: int) -> list[Breakpoint]:
    """Returns the breakpoint of a method on every split, with retention averaged over its seeds.

    Args:
        name: name of the method.
        summaries: evaluations of the method, one per seed.
        reference: evaluation of the model with all tokens.
        full: number of all tokens.
    """
    breakpoints = []
    for index, split in enumerate(summaries[0].splits):
        kept = {}
        for budget in summaries[0].budgets:
            over_seeds = [
                retentions([summary.splits[index]], budget, reference.splits, full).get(split.name)
                for summary in summaries
            ]
            defined = [each for each in over_seeds if each is not None]
            if defined:
                kept[budget] = mean_of(defined)
        # Retention is undefined where the full model scores 0.
        if kept:
            breakpoints.append(breakpoint_of(name, split.name.rpartition("/")[2], kept))
    return breakpoints


def kinds_kept(
    methods: Mapping[str, Sequence[Summary]], reference: Summary, full: int
) -> dict[tuple[str, str], dict[int, Estimate]]:
    """Returns the retention of each method on each kind of question: by (method, kind), then by budget, percent.

    Args:
        methods: evaluations of each method, one per seed; retention is averaged over seeds.
        reference: evaluation of the model with all tokens.
        full: number of all tokens.
    """
    rows = [(name, budget) for name, seeds in methods.items() for budget in seeds[0].budgets]
    kept: dict[tuple[str, str], dict[int, Estimate]] = {}
    for benchmark in dict.fromkeys(split.benchmark for split in reference.splits):
        indices = [
            index
            for index, split in enumerate(reference.splits)
            if split.benchmark == benchmark and is_mean_of_values(split)
        ]
        samples = [sample for index in indices for sample in reference.splits[index].samples]
        kinds = [kind_of(sample) for sample in samples]
        if not any(kinds):
            continue
        base = [_values(reference.splits, indices, full)]
        reduced = [
            np.mean([_values(seed.splits, indices, budget) for seed in methods[name]], axis=0) for name, budget in rows
        ]
        clusters = [cluster_of(sample) for sample in samples]
        values_RN = np.array(base + reduced)
        for kind in sorted(set(kinds) - {""}):
            inside = [index for index, each in enumerate(kinds) if each == kind]
            owners = [clusters[index] for index in inside]
            full_score, *scores = estimate_means(
                [ClusteredValues(row[inside].tolist(), owners, key=key) for key, row in enumerate(values_RN)],
                seed=zlib.crc32(benchmark.encode()),
            )
            if not full_score.value > 0:
                continue
            for (name, budget), score in zip(rows, scores, strict=True):
                # Retention is averaged over the benchmarks that have this kind of question, as it is over splits.
                own = retention_of(score, full_score)
                before = kept.setdefault((name, kind), {}).get(budget)
                kept[name, kind][budget] = own if before is None else mean_of([before, own])
    return kept


def _values(splits: Sequence[SplitScores], indices: Sequence[int], budget: int) -> Floats:
    return np.concatenate([np.array(splits[index].scores[budget].values, dtype=np.float64) for index in indices])


def _smallest_from_which_all(holds: Mapping[int, bool]) -> int | None:
    smallest = None
    for budget in sorted(holds, reverse=True):
        if not holds[budget]:
            break
        smallest = budget
    return smallest


def _largest_up_to_which_all(holds: Mapping[int, bool]) -> int | None:
    largest = None
    for budget in sorted(holds):
        if not holds[budget]:
            break
        largest = budget
    return largest
