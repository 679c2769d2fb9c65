"""Result types of the study of training-free reduction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from parcelray.evaluation.scoring.aggregate import Frontier, FrontierPoint
from parcelray.evaluation.scoring.summary import Summary
from parcelray.studies.reduction.breakpoints import Breakpoint, FinePoint
from parcelray.studies.reduction.comparisons import PairwiseResult
from parcelray.studies.reduction.methods import Method, Placement


@dataclass(frozen=True)
class StudyEvaluations:
    """The evaluations of a study."""

    methods: Mapping[str, Method]
    """The methods by name, without random sampling."""
    summaries: Mapping[str, Summary]
    """The evaluation of each method, by name."""
    random: Mapping[Placement, Sequence[Summary]]
    """The evaluations of random sampling, one per seed."""
    reference: Summary
    """The evaluation of the blind model and of the model with all tokens."""
    full: int
    """Number of all tokens."""


@dataclass(frozen=True)
class ReductionStudy:
    """The results of a study."""

    frontier: Frontier
    groups: Mapping[str, Sequence[str]]
    """Names of the methods by panel of the figure."""
    against_random: Sequence[PairwiseResult]
    """Each method against random sampling with the same token placement, at each of its budgets."""
    against_spatial: Sequence[PairwiseResult]
    """Each method against spatial sampling with the same token placement, at each of its budgets."""
    against_best: Sequence[PairwiseResult]
    """The other methods against the method with the highest score at the same budget."""
    fine: Sequence[FinePoint]
    """Retention by kind of question."""
    breakpoints: Sequence[Breakpoint]
    """Breakpoints by family, then by kind of question."""
    operating: Sequence[FrontierPoint]
    """The points on the Pareto front of score and compute, by ascending compute."""
    knee: FrontierPoint | None
    """The knee of that front."""
    warnings: Sequence[str]
    """Warnings about the methods or the experiment, one sentence each."""
    folder: Path
    """Folder of the tables and figures."""
