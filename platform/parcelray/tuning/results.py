"""What a search found: the front, its knee, the best, what mattered, and of a split search the routing; as tables, files, pictures and metrics."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console
from rich.table import Table

from parcelray.config.evaluate import EvaluateJob
from parcelray.config.loader import set_key, validate
from parcelray.config.objectives import SCORES
from parcelray.config.tune import PbtAlgorithm, TuneJob
from parcelray.errors import UserError
from parcelray.evaluation.adaptive.adaptive_budget import AdaptiveStudy
from parcelray.evaluation.adaptive.study import write_study
from parcelray.evaluation.adaptive.tables import adaptive_table
from parcelray.evaluation.scoring.aggregate import mean_of, retentions
from parcelray.evaluation.scoring.intervals import Interval
from parcelray.evaluation.scoring.split_scores import Estimate
from parcelray.evaluation.scoring.summary import Summary
from parcelray.models.checkpoint import MANIFEST_NAME
from parcelray.models.connectors.routing import default_routing
from parcelray.models.vlm import config_of, write_rerouted
from parcelray.tracking.mlflow_tracker import MlflowRunLogger
from parcelray.tuning.adaptive import frontier_curves, study_split_search
from parcelray.tuning.evaluate_trial import BYTES, EvaluatedPoint, WarmEvaluator, prefill_costs
from parcelray.tuning.nearly_best import FamilyChoice, choose_families
from parcelray.tuning.pareto import knee_point, losses, pareto_front
from parcelray.tuning.planner import importance
from parcelray.tuning.plots import (
    FamilyRow,
    RivalPoint,
    SearchPoint,
    plot_families,
    plot_importance,
    plot_parallel,
    plot_search,
    plot_splits,
    plot_volume,
)
from parcelray.tuning.progress import VOLUME, best_of, bounds_of, describe, show_value, volumes
from parcelray.tuning.selection import parse_selection
from parcelray.tuning.split_routing import ChosenSplit, choose_splits, routing_of
from parcelray.tuning.trial_record import FinishedTrial


class Rival(NamedTuple):
    """Another model, asked the questions of a search."""

    summary: Summary
    checkpoint: Path


@dataclass(frozen=True)
class SearchFindings:
    """A finished search, read."""

    trials: Sequence[FinishedTrial]
    """All, failed ones included, in the order in which they finished."""
    front: Sequence[int]
    """Places of the trials that none beats in all objectives."""
    knee: int | None
    """Place of the one between them where the front bends most."""
    volume: Sequence[float]
    """Hypervolume after each trial, as a share of the box of all values that the objectives can have; empty where that is not known."""
    importance: Mapping[str, float]
    """Of each parameter for the first objective."""
    splits: Sequence[ChosenSplit]
    """Of a split search: the split of every budget."""
    rivals: Mapping[str, Sequence[RivalPoint]]
    """Other models at the same budgets."""
    families: Sequence[FamilyChoice] = ()
    """Of searches over evaluations: what is good for each family."""
    source: Path | None = None
    """Checkpoint of the searched model; None: the trials are trainings."""
    full: int = 0
    """Its largest budget."""
    adaptive: AdaptiveStudy | None = None
    """Of a split search that asks for it: budgets chosen per image and question."""
    no_adaptive: str | None = None
    """Why there is none although it was asked for."""

    @property
    def failed(self) -> Sequence[FinishedTrial]:
        """Trials with an error."""
        return [trial for trial in self.trials if trial.error is not None]

    @property
    def stopped(self) -> Sequence[FinishedTrial]:
        """Trials that early stopping ended."""
        return [trial for trial in self.trials if trial.stopped]

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {
            "trials": [asdict(trial) for trial in self.trials],
            "front": list(self.front),
            "knee": self.knee,
            "hypervolume": list(self.volume),
            "importance": dict(self.importance),
            "families": [
                each._asdict()
                | {
                    "retention": each.retention._asdict(),
                    "best_retention": each.best_retention._asdict(),
                }
                for each in self.families
            ],
            "splits": [
                each._asdict()
                | {"against_rule": each.against_rule._asdict() if each.against_rule is not None else None}
                for each in self.splits
            ],
            "routing": [route.model_dump() for route in routing_of(self.splits, self.full)],
            "rivals": {name: [point._asdict() for point in points] for name, points in self.rivals.items()},
            "adaptive": frontier_curves(self.adaptive) if self.adaptive is not None else {},
        }


def findings_of(
    job: TuneJob, trials: Sequence[FinishedTrial], evaluator: WarmEvaluator | None, rivals: Mapping[str, Rival]
) -> SearchFindings:
    """Reads a search.

    Args:
        job: the search.
        trials: finished ones.
        evaluator: scores points again from their answers; None: the trials are trainings.
        rivals: evaluations of other models on the same questions.
    """
    values = losses(
        [[trial.metrics.get(each.metric, float("nan")) for each in job.objectives] for trial in trials],
        [each.mode for each in job.objectives],
    )
    bounds = bounds_of(job.objectives, evaluator.bounds() if evaluator is not None else {})
    points = (
        {place: evaluator.evaluate(trial.assignment) for place, trial in enumerate(trials) if trial.error is None}
        if evaluator is not None
        else {}
    )
    splits = _splits(job, trials, points, evaluator) if evaluator is not None and job.splits is not None else ()
    adaptive, no_adaptive = (
        _adaptive(job, splits, trials, points, evaluator)
        if evaluator is not None and job.adaptive is not None
        else (None, None)
    )
    return SearchFindings(
        trials=trials,
        front=pareto_front(values),
        knee=knee_point(values),
        volume=volumes(job, trials, bounds) if bounds is not None else (),
        # The values of a population changed on the way, also past the ends of their domains.
        importance=(
            {}
            if isinstance(job.algorithm, PbtAlgorithm)
            else importance(job.space, trials, job.objectives[0], job.seed)
        ),
        splits=splits,
        rivals=(
            {name: _rival_points(job, rival, evaluator) for name, rival in rivals.items()}
            if evaluator is not None
            else {}
        ),
        families=_families(trials, points, evaluator) if evaluator is not None else (),
        source=evaluator.models[evaluator.job.model.reference].checkpoint.path if evaluator is not None else None,
        full=evaluator.reference[1] if evaluator is not None else 0,
        adaptive=adaptive,
        no_adaptive=no_adaptive,
    )


def select(job: TuneJob, trials: Sequence[FinishedTrial], text: str, path: Path) -> FinishedTrial:
    """Writes the job file of the trial that a selection asks for, such as `max retention subject to tokens <= 64`.

    An evaluation asks the test split, whatever split the search chose on: the best of many on one split is too good
    there.

    Raises:
        UserError: the selection has another form, or no trial satisfies it.
    """
    good = [trial for trial in trials if trial.error is None]
    if not good:
        raise UserError(f"The search {job.name} has no finished trial to select from; run it first.")
    chosen = good[parse_selection(text).choose([trial.metrics for trial in good])]
    data = job.base.model_dump(mode="json", exclude_unset=True)
    for key, value in chosen.assignment.items():
        set_key(data, key, value, "the search")
    data["name"] = f"{job.name[:50]}-{chosen.key}"
    for benchmark in data.get("benchmarks", ()):
        if benchmark.get("source", {}).get("split") == "validation":
            benchmark["source"]["split"] = "test"
    validate(type(job.base), data, "the selected trial")
    path.parent.mkdir(parents=True, exist_ok=True)
    found = ", ".join(f"{name} {value:.4g}" for name, value in chosen.metrics.items() if "/" not in name)
    text = (
        f"# parcelray {job.base.kind} {path}\n#\n# Selected from the search {job.name} by: {text}\n# In the search it"
        f" measured {found}.\n"
    )
    path.write_text(
        text + yaml.safe_dump({"kind": data.pop("kind"), **data}, sort_keys=False, allow_unicode=True), encoding="utf-8"
    )
    return chosen


def write_findings(job: TuneJob, findings: SearchFindings, folder: Path) -> list[Path]:
    """Writes the numbers, the pictures, and of a split search the model with the routing that was found; returns what MLflow is to keep."""
    if not findings.front:
        return []
    results = folder / "results.json"
    results.write_text(json.dumps(findings.to_dict(), indent=2) + "\n", encoding="utf-8")
    files = [results]
    if findings.volume:
        files.append(folder / "volume.png")
        plot_volume(findings.volume, files[-1], title=f"{job.name}: hypervolume over trials")
    points = _points(job, findings)
    first, *others = job.objectives
    if others:
        rule = [(point.x, point.y) for point in points if point.on_rule]
        files.append(folder / "frontier.png")
        plot_search(
            points,
            {name: members for name, members in findings.rivals.items() if members},
            sorted(rule),
            files[-1],
            title=f"{job.name}: {first.metric} against {others[0].metric}",
            axes=(others[0].metric, first.metric),
            curves=frontier_curves(findings.adaptive) if findings.adaptive is not None else {},
        )
    files.append(folder / "parallel.png")
    plot_parallel(
        [_row(job, trial) for trial in findings.trials if trial.error is None],
        [*job.space.parameters, first.metric],
        files[-1],
        title=job.name,
    )
    if findings.importance:
        files.append(folder / "importance.png")
        plot_importance(
            findings.importance,
            files[-1],
            title=f"{job.name}: share of the variance of {first.metric} that a parameter explains",
        )
    if findings.families:
        files.append(folder / "families.png")
        rows = [
            FamilyRow(
                each.family,
                findings.trials[each.trial].metrics["tokens"],
                each.retention,
                findings.trials[each.best].metrics["tokens"],
                each.best_retention,
            )
            for each in findings.families
        ]
        plot_families(rows, files[-1], title=f"{job.name}: retention by family, 95 % intervals")
    if findings.splits:
        files += _write_routing(job, findings, folder)
    if findings.adaptive is not None:
        files += write_study(findings.adaptive, folder / "adaptive", model=str(findings.source), name=job.name)
    return files


def show_findings(job: TuneJob, findings: SearchFindings, folder: Path, console: Console) -> None:
    """Prints the front, the best and the knee, and what to do next."""
    metrics = [objective.metric for objective in job.objectives]
    table = Table(
        "trial", *metrics, *(name.rpartition(".")[2] for name in job.space.parameters), title=f"{job.name}: the front"
    )
    order = sorted(findings.front, key=lambda place: findings.trials[place].metrics.get(metrics[-1], 0.0))
    for place in order:
        trial = findings.trials[place]
        notes = ["knee"] * (place == findings.knee and len(metrics) > 1) + ["stopped"] * trial.stopped
        name = f"{trial.key} ({', '.join(notes)})" if notes else trial.key
        table.add_row(
            name,
            *(f"{trial.metrics[metric]:.4g}" for metric in metrics),
            *(show_value(trial.assignment.get(key, "-")) for key in job.space.parameters),
        )
    console.print(table)
    if findings.families:
        console.print(_family_table(job, findings))
    if findings.splits:
        console.print(_split_table(findings.splits))
        routing = json.dumps([route.model_dump() for route in routing_of(findings.splits, findings.full)]).replace(
            '"', ""
        )
        if (folder / "model").is_dir():
            console.print(f"Model with this routing: {folder / 'model'}", highlight=False)
        console.print(
            f"In a training or the quickstart: --set 'connector.routing={routing}'", highlight=False, soft_wrap=True
        )
    if findings.adaptive is not None:
        console.print(adaptive_table(findings.adaptive))
    if findings.no_adaptive is not None:
        console.print(f"No budgets per image and question: {findings.no_adaptive}", highlight=False, markup=False)
    best = best_of(job, findings.trials)
    if best is not None:
        console.print(
            f"Best {metrics[0]}: {best.metrics[metrics[0]]:.4g} at {describe(best.assignment)}", highlight=False
        )
    if findings.importance:
        console.print(
            "Importance: " + ", ".join(f"{name} {value:.2f}" for name, value in findings.importance.items()),
            highlight=False,
        )
    if findings.stopped:
        console.print(
            f"{len(findings.stopped)} trials were stopped early; their numbers are those of their last report",
            highlight=False,
        )
    if findings.failed:
        console.print(
            f"{len(findings.failed)} trials failed; --resume --retry-failed runs them again. The first:"
            f" {findings.failed[0].error}",
            highlight=False,
            markup=False,
        )
    console.print(f"Numbers and pictures: {folder}", highlight=False)


def record_findings(uri: str, run_id: str, findings: SearchFindings, files: Sequence[Path]) -> None:
    """Metrics and pictures of the search's own run: the hypervolume over trials, and the front's objectives."""
    tracker = MlflowRunLogger(uri, run_id)
    for place, share in enumerate(findings.volume, 1):
        tracker.log_metrics({VOLUME: share}, place)
    counts = {"trials": len(findings.trials), "failed": len(findings.failed), "stopped": len(findings.stopped)}
    tracker.log_metrics({f"search/{name}": float(count) for name, count in counts.items()}, len(findings.trials))
    for name, points in findings.rivals.items():
        for point in points:
            tracker.log_metrics({f"rival/{name}": point.y}, point.num_visual_tokens)
    if findings.adaptive is not None:
        for label, curve in frontier_curves(findings.adaptive).items():
            for tokens, value in curve:
                tracker.log_metrics({f"adaptive/{label}": value}, round(tokens))
    for file in files:
        if file.is_file():
            tracker.log_figure_file(file) if file.suffix == ".png" else tracker.log_artifact(file)
    tracker.close()


def _splits(
    job: TuneJob, trials: Sequence[FinishedTrial], points: Mapping[int, EvaluatedPoint], evaluator: WarmEvaluator
) -> list[ChosenSplit]:
    constraint = job.splits
    assert constraint is not None
    found: dict[int, dict[int, Estimate]] = {}
    gflops: dict[int, dict[int, float]] = {}
    for place, point in points.items():
        for budget in point.budgets:
            grid = int(trials[place].assignment[constraint.anchor_grid])
            found.setdefault(budget, {})[grid] = evaluator.estimate(point, budget, _quality(job))
            gflops.setdefault(budget, {})[grid] = trials[place].metrics["gflops"]
    return choose_splits(found, gflops, _rule(constraint.patch_grid, sorted(found)))


def _adaptive(
    job: TuneJob,
    splits: Sequence[ChosenSplit],
    trials: Sequence[FinishedTrial],
    points: Mapping[int, EvaluatedPoint],
    evaluator: WarmEvaluator,
) -> tuple[AdaptiveStudy | None, str | None]:
    """The study, or why there is none: a search is worth its results also where too few questions are left to choose by."""
    assert job.splits is not None
    assert job.adaptive is not None
    chosen = {
        each.num_visual_tokens: each.anchor_grid for each in splits if each.num_visual_tokens in job.adaptive.budgets
    }
    found = {
        budget: point
        for place, point in points.items()
        for budget in point.budgets
        if chosen.get(budget) == trials[place].assignment[job.splits.anchor_grid]
    }
    if len(found) < 2:
        return (
            None,
            (
                f"{len(found)} of the budgets {', '.join(map(str, job.adaptive.budgets))} have a finished trial; at"
                " least two are needed."
            ),
        )
    try:
        return study_split_search(found, evaluator, job.objectives[0].metric), None
    except UserError as error:
        return None, str(error)


def _families(
    trials: Sequence[FinishedTrial], points: Mapping[int, EvaluatedPoint], evaluator: WarmEvaluator
) -> list[FamilyChoice]:
    found: dict[str, dict[int, Estimate]] = {}
    for place, point in points.items():
        for family in sorted({split.family for split in point.splits}):
            kept = mean_of([evaluator.estimate(point, budget, f"retention/{family}") for budget in point.budgets])
            if kept.n:
                found.setdefault(family, {})[place] = kept
    return choose_families(found, lambda place: (trials[place].metrics["tokens"], trials[place].metrics["gflops"]))


def _quality(job: TuneJob) -> str:
    """The first objective that says how good answers are; retention, if none does."""
    return next((each.metric for each in job.objectives if each.metric.partition("/")[0] in SCORES), "retention")


def _rule(patch_grid: int, budgets: Sequence[int]) -> dict[int, int]:
    """The paper's anchor grid for each budget that its rule reaches."""
    try:
        routes = default_routing(patch_grid)
    except UserError:
        return {}
    return {
        budget: route.anchor_grid
        for budget in budgets
        for route in routes
        if route.min_budget <= budget <= route.max_budget
    }


def _rival_points(job: TuneJob, rival: Rival, evaluator: WarmEvaluator) -> list[RivalPoint]:
    """At the rival's own costs; without the points whose objectives are not known of it, such as its latency."""
    points = []
    for budget in rival.summary.budgets:
        values = [_of_rival(each.metric, rival, budget, evaluator) for each in job.objectives[:2]]
        y, *x = values
        if y is not None and x and x[0] is not None:
            points.append(RivalPoint(x[0].value, y.value, y.low, y.high, budget))
    return points


def _of_rival(metric: str, rival: Rival, budget: int, evaluator: WarmEvaluator) -> Interval | None:
    name, _, family = metric.partition("/")
    splits = [split for split in rival.summary.splits if not family or split.family == family]
    if name == "retention":
        return mean_of(list(retentions(splits, budget, *evaluator.reference).values())).interval
    if name == "score":
        return mean_of([split.scores[budget].estimate for split in splits]).interval
    costs = prefill_costs(
        rival.checkpoint, config_of(rival.checkpoint).connector_config, budget, BYTES[evaluator.job.dtype]
    )
    return Interval(costs[name], costs[name], costs[name], 0) if name in costs else None


def _points(job: TuneJob, findings: SearchFindings) -> list[SearchPoint]:
    if len(job.objectives) < 2:
        return []
    y, x = job.objectives[0].metric, job.objectives[1].metric
    rule = {(each.num_visual_tokens, each.rule) for each in findings.splits}
    points = []
    for place, trial in enumerate(findings.trials):
        if x in trial.metrics and y in trial.metrics:
            grid = trial.assignment.get(job.splits.anchor_grid) if job.splits is not None else None
            on_rule = (int(trial.metrics.get("tokens", 0)), grid) in rule
            points.append(
                SearchPoint(
                    trial.metrics[x], trial.metrics[y], place in findings.front, place == findings.knee, on_rule
                )
            )
    return points


def _row(job: TuneJob, trial: FinishedTrial) -> dict[str, Any]:
    first = job.objectives[0].metric
    return {**trial.assignment, first: trial.metrics.get(first)}


def _write_routing(job: TuneJob, findings: SearchFindings, folder: Path) -> list[Path]:
    assert isinstance(job.base, EvaluateJob)
    routing = routing_of(findings.splits, findings.full)
    file, heat = folder / "routing.yaml", folder / "splits.png"
    data = [route.model_dump() for route in routing]
    file.write_text(yaml.safe_dump({"connector.routing": data}, sort_keys=False), encoding="utf-8")
    cells = {
        (budget, int(trial.assignment[job.splits.anchor_grid])): trial.metrics[job.objectives[0].metric]
        for trial in findings.trials
        if trial.error is None and job.splits is not None
        for budget in [int(trial.metrics["tokens"])]
    }
    chosen = {each.num_visual_tokens: each.anchor_grid for each in findings.splits}
    rule = {each.num_visual_tokens: each.rule for each in findings.splits if each.rule is not None}
    plot_splits(cells, chosen, rule, heat, title=f"{job.name}: {job.objectives[0].metric} of every split")
    # A model without a manifest is not ours to write anew.
    if findings.source is not None and (findings.source / MANIFEST_NAME).is_file():
        write_rerouted(findings.source, folder / "model", routing, f"tune-{job.name}")
    return [file, heat]


def _family_table(job: TuneJob, findings: SearchFindings) -> Table:
    columns = [name.rpartition(".")[2] for name in job.space.parameters]
    title = f"{job.name}: the cheapest within one standard error of the best, by family"
    table = Table(
        "family", "retention [95 %]", "tokens", *columns, "best of all [95 %]", "its tokens", "as good", title=title
    )
    for each in findings.families:
        chosen, best = findings.trials[each.trial], findings.trials[each.best]
        values = (show_value(chosen.assignment.get(key, "-")) for key in job.space.parameters)
        shown = [
            f"{interval.value:.1f} [{interval.low:.1f}, {interval.high:.1f}]"
            for interval in (each.retention, each.best_retention)
        ]
        table.add_row(
            each.family,
            shown[0],
            f"{chosen.metrics['tokens']:g}",
            *values,
            shown[1],
            f"{best.metrics['tokens']:g}",
            str(each.near),
        )
    return table


def _split_table(splits: Sequence[ChosenSplit]) -> Table:
    table = Table(
        "tokens",
        "anchors",
        "queries",
        "best",
        "paper's rule",
        "minus the rule, points [95 %]",
        title="The split of every budget",
    )
    for each in splits:
        gap = each.against_rule
        anchors = each.anchor_grid**2
        shown = (
            "-"
            if gap is None
            else "same"
            if each.anchor_grid == each.rule
            else f"{gap.value:+.1f} [{gap.low:+.1f}, {gap.high:+.1f}]"
        )
        names = [f"{side} x {side}" if side else "none" for side in (each.anchor_grid, each.best)]
        table.add_row(
            str(each.num_visual_tokens),
            names[0],
            str(each.num_visual_tokens - anchors),
            names[1],
            "-" if each.rule is None else f"{each.rule} x {each.rule}",
            shown,
        )
    return table
