"""Results of the study of training-free reduction: what the methods answered, and what follows from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from parcelray.evaluation.scoring.aggregate import Frontier, FrontierPoint
from parcelray.evaluation.scoring.summary import Summary
from parcelray.studies.reduction.breaks import Break, FinePoint
from parcelray.studies.reduction.comparisons import Against
from parcelray.studies.reduction.methods import Method, Placement


@dataclass(frozen=True)
class ReductionStudy:
    """What the study found."""

    frontier: Frontier
    groups: Mapping[str, Sequence[str]]
    """Methods by panel of the figure."""
    against_random: Sequence[Against]
    """Each method against random sampling with its tokens placed alike, at every one of its budgets."""
    against_spatial: Sequence[Against]
    """The same against spatial sampling."""
    against_best: Sequence[Against]
    """The others against the method with the highest score at the same budget."""
    fine: Sequence[FinePoint]
    breaks: Sequence[Break]
    """By family and by kind of questions."""
    operating: Sequence[FrontierPoint]
    """What no other measured point beats in score and compute, from the cheapest on."""
    knee: FrontierPoint | None
    """Where those bend most."""
    signs: Sequence[str]
    """What speaks against the methods or the experiment."""
    folder: Path


@dataclass(frozen=True)
class Found:
    """What the methods answered."""

    methods: Mapping[str, Method]
    summaries: Mapping[str, Summary]
    """By name; random sampling is not among them."""
    random: Mapping[Placement, Sequence[Summary]]
    """One for each seed."""
    reference: Summary
    """Blind, and with all tokens."""
    full: int
    """How many those are."""
