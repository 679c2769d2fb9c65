"""Several trainings from one start, against a reference trained as long, scored on the same samples: a frontier over budgets."""

from collections.abc import Mapping

from rich.console import Console

from parcelray.cluster.training_run import TrainedRun, run_training
from parcelray.config.train import ReportConfig, TrainJob
from parcelray.evaluation.aggregate import Frontier, frontier_point
from parcelray.evaluation.held_out import held_out, image_size_of, score_majority
from parcelray.evaluation.predictor import BLIND
from parcelray.evaluation.stored_scores import scored

REFERENCE = "vanilla"
"""The job without compression that retention is measured against."""


def train_all(jobs: Mapping[str, TrainJob], console: Console, *, address: str | None, parent_run_id: str | None) -> dict[str, TrainedRun]:
    """Trains each job that is not done yet, one after the other."""
    return {method: run_training(job, console, address=address, parent_run_id=parent_run_id, report=False) for method, job in jobs.items()}


def build_frontier(jobs: Mapping[str, TrainJob], runs: Mapping[str, TrainedRun], report: ReportConfig, console: Console) -> Frontier:
    """Scores every run at every budget, with retention against the reference at full tokens, beside the blind model and the majority class.

    Args:
        jobs: by method; one of them is `REFERENCE`.
        runs: their trainings.
        report: budgets and sample count.
        console: for progress messages.
    """
    base = runs[REFERENCE].model_folder
    data = jobs[REFERENCE].data
    samples = held_out(data, report.samples, base)
    full = max(jobs[REFERENCE].budget.values())
    console.print(f"Scoring {len(samples)} test samples: {REFERENCE} at {full} tokens and blind", highlight=False)
    reference = scored(base, samples, [full, BLIND], base.parent / "scores.json")
    points = [
        frontier_point("majority", 0, score_majority(data, samples, image_size_of(base)), None),
        frontier_point("blind", 0, reference[BLIND], None),
        frontier_point(REFERENCE, full, reference[full], reference[full]),
    ]
    for method, run in runs.items():
        if method == REFERENCE:
            continue
        console.print(f"Scoring {len(samples)} test samples: {method} at {', '.join(map(str, report.budgets))} tokens", highlight=False)
        scores = scored(run.model_folder, samples, report.budgets, run.model_folder.parent / "scores.json")
        points += [frontier_point(method, budget, scores[budget], reference[full]) for budget in report.budgets]
    return Frontier(points=tuple(points), reference=REFERENCE)


def best_method(frontier: Frontier) -> str:
    """The elastic method with the highest mean score over its budgets."""
    scores: dict[str, list[float]] = {}
    for point in frontier.points:
        if point.method not in (REFERENCE, "blind", "majority"):
            scores.setdefault(point.method, []).append(point.overall.value)
    return max(scores, key=lambda method: sum(scores[method]) / len(scores[method]))
