"""The study of training-free reduction: all methods on the same model and samples.

It gives accuracy against compute, tests against random and spatial sampling, and the breakpoints of each family.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from parcelray.cluster.session import ray_session
from parcelray.config.evaluate import EvaluateJob
from parcelray.config.reducer import ReducerConfig
from parcelray.errors import UserError
from parcelray.evaluation.run import run_evaluation
from parcelray.evaluation.scoring.aggregate import Frontier, FrontierPoint, frontier_point, retentions
from parcelray.evaluation.scoring.estimate import mean_of
from parcelray.evaluation.scoring.summary import Summary
from parcelray.models.vlm import config_of, connector_of
from parcelray.profiling.backbone_shapes import BackboneShape, from_transformers_config
from parcelray.profiling.reduction_flops import reduced_prefill_flops
from parcelray.studies.reduction.breakpoints import FinePoint, breakpoint_of, family_breakpoints, kinds_kept
from parcelray.studies.reduction.comparisons import PairwiseTest, run_tests, spread_of
from parcelray.studies.reduction.files import operating_table, pairwise_table, record_study, slug, write_study
from parcelray.studies.reduction.methods import (
    DECODER_ATTENTION,
    ENCODER_ATTENTION,
    RANDOM,
    RETENTIONS,
    SPATIAL,
    Method,
    Placement,
    all_budgets,
    groups_of,
    methods_of,
    random_of,
    union,
)
from parcelray.studies.reduction.results import ReductionStudy, StudyEvaluations
from parcelray.studies.reduction.warnings import describe, warnings_of
from parcelray.tracking.mlflow_tracker import tracked_run
from parcelray.tracking.registry import resolve_model
from parcelray.tracking.run_folder import study_folder
from parcelray.tracking.store import ensure_store
from parcelray.tuning.pareto import knee_point, losses, pareto_front

_TEXT_TOKENS = 32
"""Tokens of the prompt for which compute is given."""


def run_reduction_study(
    job: EvaluateJob,
    console: Console,
    *,
    address: str | None = None,
    methods: Sequence[str] | None = None,
    shares: Sequence[float] = RETENTIONS,
    equal_budgets: bool = False,
) -> ReductionStudy:
    """Evaluates all methods, reusing stored predictions, and writes the results.

    Args:
        job: model, benchmarks and use of the cluster; the study sets the reducer and the budgets.
        console: prints progress and results.
        address: address of the Ray cluster; None: RAY_ADDRESS, else a local instance.
        methods: names of methods from `methods_of`; None: all. Random and spatial sampling with the same token
            placement are always added.
        shares: shares of the visual tokens; each method is evaluated at the nearest budgets that it supports.
        equal_budgets: whether all methods are evaluated at the same budgets, those nearest to `shares` that all
            methods support.

    Raises:
        UserError: a method is unknown; or see `run_evaluation`.
    """
    uri = ensure_store(job.tracking.uri) if job.tracking.uri is not None else None
    checkpoint = resolve_model(job.model, uri)
    config = config_of(checkpoint.path)
    full = max(connector_of(checkpoint.path).supported_budgets)
    chosen = _chosen(methods_of(config.depths), methods)
    budgets = all_budgets(chosen, full, config.depths, equal=equal_budgets, retentions=shares)
    params: dict[str, str | int | float | bool | None] = {
        "model": checkpoint.pinned,
        "methods": len(chosen),
        "benchmarks": ", ".join(choice.name for choice in job.benchmarks),
    }
    run = (
        tracked_run(uri, job.tracking.experiment, f"study-{job.name}", params=params)
        if uri is not None
        else nullcontext(None)
    )
    with run as run_id, nullcontext() if job.compute.actors == 0 else ray_session(address):

        def evaluate(name: str, reducer: ReducerConfig | None, at: Sequence[int | str]) -> Summary:
            changes = {"name": f"{job.name}-{slug(name)}", "reducer": reducer, "budgets": tuple(at)}
            each = EvaluateJob.model_validate(job.model_dump() | changes)
            return run_evaluation(each, console, parent_run_id=run_id, tables=False).summary

        reference = evaluate("full", None, ("blind", "full"))
        summaries = {name: evaluate(name, method.reducer, budgets[name]) for name, method in chosen.items()}
        random = {}
        for placement in dict.fromkeys(method.placement for method in chosen.values()):
            at = union(budgets[name] for name, method in chosen.items() if method.placement == placement)
            random[placement] = [
                evaluate(f"{RANDOM[placement]}, seed {seed}", each.reducer, at)
                for seed, each in enumerate(random_of(placement))
            ]
        evaluations = StudyEvaluations(chosen, summaries, random, reference, full)
        with study_folder(job.storage, f"studies/{job.name}", console) as folder:
            study = study_of(evaluations, from_transformers_config(config), folder)
            files = write_study(study, job.name)
        if uri is not None and run_id is not None:
            record_study(uri, run_id, study, files)
    console.print(pairwise_table(study.against_random, "random sampling"))
    console.print(operating_table(study))
    console.print(describe(study.warnings))
    console.print(f"Tables and figures: {study.folder}")
    return study


def study_of(evaluations: StudyEvaluations, shape: BackboneShape, folder: Path) -> ReductionStudy:
    """Computes the results of a study from its evaluations.

    Args:
        evaluations: the evaluations of all methods.
        shape: shape of the model, for the compute.
        folder: folder for the tables and figures.
    """
    reference, full = evaluations.reference, evaluations.full
    base = (reference.splits, full)
    points = [
        frontier_point("blind", 0, reference.splits, None),
        replace(frontier_point("full", full, reference.splits, base), gflops=_gflops(shape, None, full)),
    ]
    seeds = {RANDOM[placement]: summaries for placement, summaries in evaluations.random.items()}
    for name, each in seeds.items():
        points += [
            random_point(name, each, budget, reference, full, _gflops(shape, None, budget))
            for budget in each[0].budgets
        ]
    for name, summary in evaluations.summaries.items():
        for budget in summary.budgets:
            flops = _gflops(shape, evaluations.methods[name].reducer, budget)
            points.append(replace(frontier_point(name, budget, summary.splits, base), gflops=flops))
    frontier = Frontier(tuple(points), reference="full")
    all_methods = seeds | {name: [summary] for name, summary in evaluations.summaries.items()}
    kept = kinds_kept(all_methods, reference, full)
    fine = [
        FinePoint(name, kind, budget, each.interval)
        for (name, kind), budgets in kept.items()
        for budget, each in budgets.items()
    ]
    breakpoints = [
        each for name, summaries in all_methods.items() for each in family_breakpoints(name, summaries, reference, full)
    ]
    breakpoints += [breakpoint_of(name, kind, budgets) for (name, kind), budgets in kept.items()]
    spatial = {
        placement: [evaluations.summaries[name]] for placement, name in SPATIAL.items() if name in evaluations.summaries
    }
    against_spatial = run_tests(_tests(evaluations, spatial))
    spreads = {
        (name, budget): spread_of(each, budget) or 0.0 for name, each in seeds.items() for budget in each[0].budgets
    }
    saliency = [
        name for name, method in evaluations.methods.items() if method.group in (ENCODER_ATTENTION, DECODER_ATTENTION)
    ]
    operating, knee = operating_points(points)
    return ReductionStudy(
        frontier=frontier,
        groups=groups_of(evaluations.methods),
        against_random=run_tests(_tests(evaluations, evaluations.random)),
        against_spatial=against_spatial,
        against_best=run_tests(_tests_against_best(evaluations)),
        fine=fine,
        breakpoints=breakpoints,
        operating=operating,
        knee=knee,
        warnings=warnings_of(frontier, fine, against_spatial, saliency, spreads),
        folder=folder,
    )


def operating_points(points: Sequence[FrontierPoint]) -> tuple[list[FrontierPoint], FrontierPoint | None]:
    """Returns the points on the Pareto front of score and compute, by ascending compute, and the knee of the front."""
    measured = sorted((point for point in points if point.gflops is not None), key=lambda point: point.gflops or 0.0)
    values = losses([(point.overall.value, point.gflops or 0.0) for point in measured], ("max", "min"))
    knee = knee_point(values)
    return [measured[index] for index in pareto_front(values)], measured[knee] if knee is not None else None


def _chosen(known: Mapping[str, Method], names: Sequence[str] | None) -> dict[str, Method]:
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise UserError(
            f"{', '.join(unknown)} is not a training-free method of this model; choose from {', '.join(known)}."
        )
    placements = {method.placement for name, method in known.items() if names is None or name in names}
    baselines = {SPATIAL[placement] for placement in placements}
    return {name: method for name, method in known.items() if names is None or name in names or name in baselines}


def _tests(evaluations: StudyEvaluations, baselines: Mapping[Placement, Sequence[Summary]]) -> list[PairwiseTest]:
    """Returns the tests of each method against the baseline with the same token placement, at all common budgets.

    A baseline is not tested against itself.
    """
    return [
        PairwiseTest(name, budget, summary, others)
        for name, summary in evaluations.summaries.items()
        for others in [baselines.get(evaluations.methods[name].placement, ())]
        if others and summary not in others
        for budget in summary.budgets
        if budget in others[0].budgets
    ]


def _tests_against_best(evaluations: StudyEvaluations) -> list[PairwiseTest]:
    """Returns the tests against the best method at every budget that several methods have."""
    summaries = evaluations.summaries
    tests = []
    for budget in union(summary.budgets for summary in summaries.values()):
        scores = {
            name: summary.mean_score(budget).value for name, summary in summaries.items() if budget in summary.budgets
        }
        best = max(scores, key=lambda name: scores[name])
        tests += [PairwiseTest(name, budget, summaries[name], [summaries[best]]) for name in scores if name != best]
    return tests


def _gflops(shape: BackboneShape, reducer: ReducerConfig | None, budget: int) -> float:
    return reduced_prefill_flops(shape, reducer, budget, _TEXT_TOKENS) / 1e9


def random_point(
    name: str, seeds: Sequence[Summary], budget: int, reference: Summary, full: int, gflops: float
) -> FrontierPoint:
    """Returns the frontier point of random sampling: the mean over its seeds, with the interval over samples."""
    points = [frontier_point(name, budget, summary.splits, (reference.splits, full)) for summary in seeds]
    kept = [mean_of(list(retentions(summary.splits, budget, reference.splits, full).values())) for summary in seeds]
    families = {
        family: (
            mean_of(
                [
                    split.scores[budget].estimate
                    for summary in seeds
                    for split in summary.splits
                    if split.name.rpartition("/")[2] == family
                ]
            ).interval
        )
        for family in points[0].families
    }
    overall = mean_of([summary.mean_score(budget) for summary in seeds]).interval
    return FrontierPoint(name, budget, overall, mean_of(kept).interval, families, points[0].unscored, gflops)
