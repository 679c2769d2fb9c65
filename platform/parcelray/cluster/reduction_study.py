"""Every training-free method on the same model and questions: accuracy against compute, which of them beat random, and where families break."""

import csv
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from parcelray.cluster.evaluation_run import run_evaluation
from parcelray.cluster.provenance import resolve_model
from parcelray.cluster.reduction_methods import METHODS, RANDOM, RANDOM_ORIGINAL, RANDOM_SEEDS, baseline_of, budgets_of, groups
from parcelray.cluster.reduction_signs import describe, failure_signs
from parcelray.cluster.session import ray_session
from parcelray.config.evaluate import EvaluateJob
from parcelray.config.reducer import ReducerConfig
from parcelray.evaluation.aggregate import Frontier, FrontierPoint, difference, frontier_point, mean_of, retentions
from parcelray.evaluation.intervals import Interval
from parcelray.evaluation.paired import two_sided
from parcelray.evaluation.split_scores import Estimate
from parcelray.evaluation.summary import Summary
from parcelray.models.vlm import config_of, connector_of
from parcelray.profiling.backbone_shapes import BackboneShape, from_transformers_config
from parcelray.profiling.reduction_flops import reduced_prefill_flops
from parcelray.reports.compute_plot import plot_compute
from parcelray.reports.frontier_files import write_frontier
from parcelray.reports.tables import frontier_markdown
from parcelray.tracking.mlflow_tracker import MlflowRunLogger, tracked_run
from parcelray.tracking.store import ensure_store

_TEXT_TOKENS = 32
_KEPT = 90.0
"""Percent of the full score below which a family is said to be broken."""


class AgainstRandom(NamedTuple):
    """A method against random sampling at the same budget and with tokens placed alike, on the same questions."""

    method: str
    num_visual_tokens: int
    difference: Interval
    """Method minus the mean over the random seeds, in points of the mean score over families."""
    p_value: float
    """Two-sided, from the paired draws."""
    spread: float
    """Standard deviation of random sampling over its seeds, in points."""


class Break(NamedTuple):
    """Where a family breaks under a method."""

    method: str
    family: str
    budget: int | None
    """The smallest budget that keeps `_KEPT` percent of the full score with the lower end of its interval's middle; None: no measured one does."""


@dataclass(frozen=True)
class ReductionStudy:
    """What the study found."""

    frontier: Frontier
    against_random: Sequence[AgainstRandom]
    breaks: Sequence[Break]
    signs: Sequence[str]
    """What speaks against the methods or the experiment."""
    folder: Path


def run_reduction_study(job: EvaluateJob, console: Console, *, address: str | None = None, methods: Sequence[str] | None = None) -> ReductionStudy:
    """Evaluates all methods; what is there already is not computed again.

    Args:
        job: model, benchmarks and use of the cluster; its reducer and budgets are set by the study.
        console: for progress.
        address: Ray cluster; None: RAY_ADDRESS, else a local instance.
        methods: names out of `METHODS`; None: all. Random sampling is always there.

    Raises:
        UserError: see `run_evaluation`.
    """
    uri = ensure_store(job.tracking.uri) if job.tracking.uri is not None else None
    checkpoint = resolve_model(job.model, uri)
    config = config_of(checkpoint.path)
    full = max(connector_of(checkpoint.path).supported_budgets)
    wanted = {baseline_of(METHODS[name]) for name in METHODS if methods is None or name in methods} | {RANDOM}
    chosen = {name: method for name, method in METHODS.items() if method.group in wanted or methods is None or name in methods}
    budgets = {name: budgets_of(method.reducer, full, config.depths) for name, method in chosen.items()}
    folder = Path(job.storage) / "studies" / job.name
    params: dict[str, str | int | float | bool | None] = {
        "model": checkpoint.pinned,
        "methods": len(chosen),
        "benchmarks": ", ".join(choice.name for choice in job.benchmarks),
    }
    run = tracked_run(uri, job.tracking.experiment, f"study-{job.name}", params=params) if uri is not None else nullcontext(None)
    with run as run_id, nullcontext() if job.compute.actors == 0 else ray_session(address):

        def evaluate(name: str, reducer: ReducerConfig | None, at: Sequence[int | str]) -> Summary:
            changes = {"name": f"{job.name}-{_slug(name)}", "reducer": reducer, "budgets": tuple(at)}
            each = EvaluateJob.model_validate(job.model_dump() | changes)
            return run_evaluation(each, console, parent_run_id=run_id, tables=False).summary

        reference = evaluate("full", None, ("blind", "full"))
        found = {name: evaluate(name, method.reducer, budgets[name]) for name, method in chosen.items()}
        study = _study(found, reference, full, from_transformers_config(config), folder)
        files = _write(study, job.name)
        if uri is not None and run_id is not None:
            _record(uri, run_id, study, files)
    console.print(against_random_table(study))
    console.print(describe(study.signs), highlight=False)
    console.print(f"Tables and figures: {folder}", highlight=False)
    return study


def against_random_table(study: ReductionStudy) -> Table:
    """Which methods beat random sampling, for people."""
    table = Table(
        "method",
        "tokens",
        "minus random, points [95 %]",
        "p",
        "sd of random over seeds",
        title="Against random sampling with tokens placed alike, paired on questions",
    )
    for each in study.against_random:
        gap = f"{each.difference.value:+.1f} [{each.difference.low:+.1f}, {each.difference.high:+.1f}]"
        table.add_row(each.method, str(each.num_visual_tokens), gap, f"{each.p_value:.3f}", f"{each.spread:.1f}")
    return table


def _study(found: Mapping[str, Summary], reference: Summary, full: int, shape: BackboneShape, folder: Path) -> ReductionStudy:
    base = (reference.splits, full)
    points = [
        replace(frontier_point("blind", 0, reference.splits, None)),
        replace(frontier_point("full", full, reference.splits, base), gflops=_gflops(shape, None, full)),
    ]
    baselines: dict[str, list[Summary]] = {}
    for name, summary in found.items():
        if METHODS[name].group in (RANDOM, RANDOM_ORIGINAL):
            baselines.setdefault(METHODS[name].group, []).append(summary)
    against: list[AgainstRandom] = []
    breaks: list[Break] = []
    for name, seeds in baselines.items():
        points += [_random_point(name, seeds, budget, reference, full, _gflops(shape, None, budget)) for budget in seeds[0].budgets]
        breaks += _breaks(name, seeds[0], reference, full)
    for name, summary in found.items():
        if METHODS[name].group in baselines:
            continue
        seeds = baselines[baseline_of(METHODS[name])]
        for budget in summary.budgets:
            flops = _gflops(shape, METHODS[name].reducer, budget)
            points.append(replace(frontier_point(name, budget, summary.splits, base), gflops=flops))
            if budget in seeds[0].budgets:
                against.append(_against_random(name, summary, seeds, budget))
        breaks += _breaks(name, summary, reference, full)
    frontier = Frontier(tuple(points), reference="full")
    spreads = {(name, budget): _spread(seeds, budget) for name, seeds in baselines.items() for budget in seeds[0].budgets}
    return ReductionStudy(frontier, against, breaks, failure_signs(found, frontier, full, spreads), folder)


def _gflops(shape: BackboneShape, reducer: ReducerConfig | None, budget: int) -> float:
    return reduced_prefill_flops(shape, reducer, budget, _TEXT_TOKENS) / 1e9


def _random_point(name: str, seeds: Sequence[Summary], budget: int, reference: Summary, full: int, gflops: float) -> FrontierPoint:
    """Random sampling as the mean over its seeds, with the interval over samples."""
    points = [frontier_point(name, budget, summary.splits, (reference.splits, full)) for summary in seeds]
    kept = [mean_of(list(retentions(summary.splits, budget, reference.splits, full).values())) for summary in seeds]
    families = {
        family: mean_of([split.scores[budget].estimate for summary in seeds for split in summary.splits if split.name.endswith(f"/{family}")]).interval
        for family in points[0].families
    }
    overall = mean_of([summary.mean_score(budget) for summary in seeds]).interval
    return FrontierPoint(name, budget, overall, mean_of(kept).interval, families, points[0].unscored, gflops)


def _against_random(name: str, summary: Summary, seeds: Sequence[Summary], budget: int) -> AgainstRandom:
    random = mean_of([each.mean_score(budget) for each in seeds])
    gap: Estimate = difference(summary.mean_score(budget), random)
    return AgainstRandom(name, budget, gap.interval, two_sided(gap), _spread(seeds, budget))


def _spread(seeds: Sequence[Summary], budget: int) -> float:
    """Standard deviation of the score over seeds, points."""
    return float(np.std([each.mean_score(budget).value for each in seeds], ddof=1)) if len(seeds) > 1 else float("nan")


def _breaks(name: str, summary: Summary, reference: Summary, full: int) -> list[Break]:
    found = []
    for split in summary.splits:
        kept = {budget: retentions([split], budget, reference.splits, full).get(split.name) for budget in summary.budgets}
        enough = [budget for budget, estimate in kept.items() if estimate is not None and estimate.value >= _KEPT]
        # The smallest from which on every larger one is enough, too.
        stable = [budget for budget in enough if all(other in enough for other in summary.budgets if other > budget)]
        found.append(Break(name, split.name.rpartition("/")[2], min(stable, default=None)))
    return found


def _write(study: ReductionStudy, name: str) -> list[Path]:
    folder = study.folder
    numbers, picture = write_frontier(study.frontier, folder, f"{name}: score against visual tokens")
    compute = folder / "accuracy_against_compute.png"
    title = f"{name}: training-free reduction, {RANDOM_SEEDS} seeds of random sampling"
    plot_compute(study.frontier, groups(), compute, title=title, baselines=(RANDOM, RANDOM_ORIGINAL))
    table = folder / "frontier.md"
    table.write_text(frontier_markdown(study.frontier) + "\n", encoding="utf-8")
    against, breaks = folder / "against_random.csv", folder / "breaks.json"
    with against.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["method", "num_visual_tokens", "difference", "low", "high", "p_value", "random_sd_over_seeds"])
        rows.writerows([each.method, each.num_visual_tokens, *each.difference[:3], each.p_value, each.spread] for each in study.against_random)
    breaks.write_text(json.dumps([each._asdict() for each in study.breaks], indent=2) + "\n", encoding="utf-8")
    signs = folder / "failure_signs.txt"
    signs.write_text(describe(study.signs) + "\n", encoding="utf-8")
    return [numbers, table, against, breaks, signs, picture, compute]


def _record(uri: str, run_id: str, study: ReductionStudy, files: Sequence[Path]) -> None:
    tracker = MlflowRunLogger(uri, run_id)
    for point in study.frontier.points:
        metrics = {f"{_slug(point.method)}/score": point.overall.value}
        if point.retention is not None:
            metrics[f"{_slug(point.method)}/retention"] = point.retention.value
        tracker.log_metrics(metrics, point.num_visual_tokens)
    for file in files:
        tracker.log_figure_file(file) if file.suffix == ".png" else tracker.log_artifact(file)
    tracker.close()


def _slug(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "_").replace("+", "_plus").lower()
