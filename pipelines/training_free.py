"""Every training-free reducer on the mini suite at four retentions, with the accuracy-against-tokens figure.

Asks the mini base, which was trained without compression, at 5, 11, 20 and 30 % of its 256 visual tokens, blind and in full. Random
sampling runs with five seeds. A second run computes nothing.

    python pipelines/training_free.py [--set storage=FOLDER]
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from parcelray.cluster.evaluation_run import run_evaluation
from parcelray.cluster.session import ray_session
from parcelray.config.evaluate import EvaluateJob
from parcelray.config.loader import load_job_of
from parcelray.config.reducer import (
    AveragePoolingConfig,
    ClusterAggregateConfig,
    DivPruneConfig,
    RandomSamplingConfig,
    ReducerConfig,
    SpatialSamplingConfig,
)
from parcelray.errors import ParcelrayError, UserError
from parcelray.evaluation.aggregate import Frontier, FrontierPoint, frontier_point, mean_of, retentions
from parcelray.evaluation.summary import Summary
from parcelray.reports.console import open_console
from parcelray.reports.frontier_files import write_frontier
from parcelray.reports.tables import frontier_table

JOB = Path(__file__).resolve().parent.parent / "jobs" / "evaluate" / "training_free.yaml"
RANDOM_SEEDS = 5
# 5, 11, 20 and 30 % of 256 tokens; average pooling takes the nearest squares.
BUDGETS = (13, 28, 51, 77)
SQUARES = (16, 25, 49, 81)

METHODS: dict[str, tuple[ReducerConfig, tuple[int, ...]]] = {
    "cluster_euclidean": (ClusterAggregateConfig(), BUDGETS),
    "cluster_cosine": (ClusterAggregateConfig(metric="cosine"), BUDGETS),
    "spatial": (SpatialSamplingConfig(), BUDGETS),
    "average_pooling": (AveragePoolingConfig(), SQUARES),
    "divprune": (DivPruneConfig(), BUDGETS),
    **{f"random_{seed}": (RandomSamplingConfig(seed=seed), BUDGETS) for seed in range(RANDOM_SEEDS)},
}


def run(job: EvaluateJob, console: Console) -> Frontier:
    """Evaluates every method, and writes table and figure."""
    with ray_session():
        reference = _evaluate(job, "full", {"budgets": ("blind", "full")}, console)
        found = {name: _evaluate(job, name, {"reducer": reducer, "budgets": budgets}, console) for name, (reducer, budgets) in METHODS.items()}
    full = max(reference.budgets)
    base = (reference.splits, full)
    points = [frontier_point("blind", 0, reference.splits, None), frontier_point("full", full, reference.splits, base)]
    for name, summary in found.items():
        if not name.startswith("random_"):
            points += [frontier_point(name, budget, summary.splits, base) for budget in summary.budgets]
    points += [_random_point([found[f"random_{seed}"] for seed in range(RANDOM_SEEDS)], budget, reference, full) for budget in BUDGETS]
    frontier = Frontier(tuple(points), reference="full")
    numbers, picture = write_frontier(frontier, Path(job.storage) / "training_free", "Training-free reduction of the mini base: score against visual tokens")
    console.print(frontier_table(frontier))
    console.print(f"Picture: {picture}; numbers: {numbers}", highlight=False)
    return frontier


def _random_point(seeds: Sequence[Summary], budget: int, reference: Summary, full: int) -> FrontierPoint:
    """Random sampling as the mean over its seeds, with the interval over samples."""
    points = [frontier_point("random", budget, summary.splits, (reference.splits, full)) for summary in seeds]
    scores = mean_of([summary.mean_score(budget) for summary in seeds]).interval
    kept = mean_of([mean_of(list(retentions(summary.splits, budget, reference.splits, full).values())) for summary in seeds]).interval
    families = {
        name: mean_of([split.scores[budget].estimate for summary in seeds for split in summary.splits if split.name.endswith(f"/{name}")]).interval
        for name in points[0].families
    }
    return FrontierPoint("random", budget, scores, kept, families, points[0].unscored)


def _evaluate(job: EvaluateJob, name: str, changes: dict[str, object], console: Console) -> Summary:
    each = EvaluateJob.model_validate(job.model_dump() | {"name": f"{job.name}-{name}"} | changes)
    return run_evaluation(each, console, tables=False).summary


def main() -> int:
    """Runs the pipeline; `--set a.b=c` changes its job."""
    console = open_console()
    arguments = sys.argv[1:]
    try:
        if len(arguments) % 2 or any(flag != "--set" for flag in arguments[::2]):
            raise UserError(f"{' '.join(arguments)} is not understood; this pipeline takes only --set a.b=c, as often as you like.")
        run(load_job_of(EvaluateJob, JOB, arguments[1::2]), console)
    except UserError as error:
        console.print(f"error: {error}", markup=False, highlight=False)
        return 2
    except ParcelrayError as error:
        console.print(f"failed: {error}", markup=False, highlight=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
