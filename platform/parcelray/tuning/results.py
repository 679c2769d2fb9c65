"""Results of a search: Pareto front, knee, best trial, parameter importance, and the routing of a split search.

`report.py` writes, prints and logs them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from parcelray.config.evaluate import BLIND, EvaluateJob
from parcelray.config.loader import set_key, validate
from parcelray.config.objectives import SCORES
from parcelray.config.paths import AS_WRITTEN
from parcelray.config.serve import ServeJob
from parcelray.config.tune import PbtAlgorithm, TuneJob
from parcelray.errors import UserError
from parcelray.evaluation.adaptive.adaptive_budget import BEFORE, FIXED, AdaptiveStudy
from parcelray.evaluation.adaptive.budget_policies import best_mixture
from parcelray.evaluation.adaptive.study import study_answers
from parcelray.evaluation.inputs import open_model
from parcelray.evaluation.plan import budgets_for, connector_at
from parcelray.evaluation.scoring.aggregate import retentions
from parcelray.evaluation.scoring.estimate import Estimate, mean_of
from parcelray.evaluation.scoring.intervals import Interval
from parcelray.evaluation.scoring.split_scores import SplitScores
from parcelray.evaluation.scoring.summary import Summary
from parcelray.models.connectors.routing import default_routing
from parcelray.models.vlm import config_of
from parcelray.tracking.registry import resolve_model
from parcelray.tuning.evaluate_trial import BYTES, EvaluatedPoint, WarmEvaluator, prefill_costs
from parcelray.tuning.pareto import knee_point, losses, pareto_front
from parcelray.tuning.planner import importance
from parcelray.tuning.plots import BaselinePoint
from parcelray.tuning.progress import bounds_of, volumes
from parcelray.tuning.selection import (
    ChosenSplit,
    FamilyChoice,
    choose_families,
    choose_splits,
    parse_selection,
    routing_of,
)
from parcelray.tuning.trial_record import FinishedTrial

_MIXTURE_POINTS = 25
"""Number of points on the curve of the mixture of budgets."""


class Baseline(NamedTuple):
    """Another model, evaluated on the samples of a search."""

    summary: Summary
    checkpoint: Path


@dataclass(frozen=True)
class SearchFindings:
    """The results of a finished search."""

    trials: Sequence[FinishedTrial]
    """All trials, including failed ones, in the order in which they finished."""
    front: Sequence[int]
    """Indices of the trials on the Pareto front."""
    knee: int | None
    """Index of the trial at the knee of the front; None without a front."""
    volume: Sequence[float]
    """Hypervolume after each trial, as a share of the box of all possible values of the objectives.

    Empty if the bounds of an objective are unknown.
    """
    importance: Mapping[str, float]
    """Importance of each parameter for the first objective."""
    splits: Sequence[ChosenSplit]
    """The chosen split of every budget; empty unless the search is a split search."""
    baselines: Mapping[str, Sequence[BaselinePoint]]
    """Other models by name, evaluated at the same budgets."""
    families: Sequence[FamilyChoice] = ()
    """The chosen trial of each benchmark family; empty if the trials are trainings."""
    source: Path | None = None
    """Checkpoint of the searched model; None if the trials are trainings."""
    full: int = 0
    """Largest budget of the searched model."""
    adaptive: AdaptiveStudy | None = None
    """Study of budgets chosen per image and question; None unless a split search requests it."""
    adaptive_problem: str | None = None
    """Reason why a requested adaptive study is missing."""

    @property
    def failed(self) -> Sequence[FinishedTrial]:
        """The trials that failed."""
        return [trial for trial in self.trials if trial.error is not None]

    @property
    def stopped(self) -> Sequence[FinishedTrial]:
        """The trials that early stopping ended."""
        return [trial for trial in self.trials if trial.stopped]

    def to_dict(self) -> dict[str, Any]:
        """Returns the results as JSON-serialisable values."""
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
            # The file format keeps the name under which the baselines were first written.
            "rivals": {name: [point._asdict() for point in points] for name, points in self.baselines.items()},
            "adaptive": frontier_curves(self.adaptive) if self.adaptive is not None else {},
        }


def findings_of(
    job: TuneJob, trials: Sequence[FinishedTrial], evaluator: WarmEvaluator | None, baselines: Mapping[str, Baseline]
) -> SearchFindings:
    """Computes the results of a search.

    Args:
        job: the search.
        trials: the finished trials.
        evaluator: scores the points again from their stored predictions; None if the trials are trainings.
        baselines: evaluations of other models on the same samples, by name.
    """
    values = losses(
        [[trial.metrics.get(each.metric, float("nan")) for each in job.objectives] for trial in trials],
        [each.mode for each in job.objectives],
    )
    bounds = bounds_of(job.objectives, evaluator.bounds() if evaluator is not None else {})
    points = (
        {index: evaluator.evaluate(trial.assignment) for index, trial in enumerate(trials) if trial.error is None}
        if evaluator is not None
        else {}
    )
    splits = _splits(job, trials, points, evaluator) if evaluator is not None and job.splits is not None else ()
    adaptive, adaptive_problem = (
        _adaptive(job, splits, trials, points, evaluator)
        if evaluator is not None and job.adaptive is not None
        else (None, None)
    )
    return SearchFindings(
        trials=trials,
        front=pareto_front(values),
        knee=knee_point(values),
        volume=volumes(job, trials, bounds) if bounds is not None else (),
        # The values of population members change during training, also beyond the ends of their domains.
        importance=(
            {}
            if isinstance(job.algorithm, PbtAlgorithm)
            else importance(job.space, trials, job.objectives[0], job.seed)
        ),
        splits=splits,
        baselines=(
            {name: _baseline_points(job, baseline, evaluator) for name, baseline in baselines.items()}
            if evaluator is not None
            else {}
        ),
        families=_families(trials, points, evaluator) if evaluator is not None else (),
        source=evaluator.models[evaluator.job.model.reference].path if evaluator is not None else None,
        full=evaluator.reference[1] if evaluator is not None else 0,
        adaptive=adaptive,
        adaptive_problem=adaptive_problem,
    )


class SelectedFiles(NamedTuple):
    """The job files of a selected trial."""

    trial: FinishedTrial
    job: Path
    """The file to run next: a serve job for an evaluation with a reducer, else the job of the trial."""
    kind: str
    """Kind of that job."""
    evaluation: Path | None
    """With a serve job, the evaluation of the trial; else None."""


def select(job: TuneJob, trials: Sequence[FinishedTrial], text: str, path: Path) -> SelectedFiles:
    """Writes the job file of the trial that a selection chooses, such as `max retention subject to tokens <= 64`.

    For an evaluation with a training-free reducer, that is a job that serves the model with the reducer at the budgets
    of the trial, and the evaluation is written next to it. A selected evaluation uses the test split, even if the
    search used the validation split: the score of the best of many trials is biased upwards on the split that it was
    chosen on.

    Args:
        job: the search.
        trials: its trials.
        text: the selection.
        path: file to write.

    Raises:
        UserError: there is no finished trial, the selection is malformed, or no trial satisfies it.
    """
    succeeded = [trial for trial in trials if trial.error is None]
    if not succeeded:
        raise UserError(f"The search {job.name} has no finished trial to select from; run the search first.")
    chosen = succeeded[parse_selection(text).choose([trial.metrics for trial in succeeded])]
    data = job.base.model_dump(mode="json", exclude_unset=True, context=AS_WRITTEN)
    for key, value in chosen.assignment.items():
        set_key(data, key, value, "the search")
    data["name"] = f"{job.name[:50]}-{chosen.key}"
    for benchmark in data.get("benchmarks", ()):
        if benchmark.get("source", {}).get("split") == "validation":
            benchmark["source"]["split"] = "test"
    selected = validate(type(job.base), data, "the selected trial")
    measured = ", ".join(f"{name} {value:.4g}" for name, value in chosen.metrics.items() if "/" not in name)
    source = f"Selected from the search {job.name} by: {text}\n# Metrics in the search: {measured}."
    served = _serve_data(selected) if isinstance(selected, EvaluateJob) else None
    if served is None:
        _write_job(path, data, source)
        return SelectedFiles(chosen, path, job.base.kind, None)
    evaluation = path.with_stem(f"{path.stem}_evaluate")
    _write_job(path, served, source)
    _write_job(evaluation, data, source)
    return SelectedFiles(chosen, path, "serve", evaluation)


def _serve_data(job: EvaluateJob) -> dict[str, Any] | None:
    """Returns the serve job of an evaluation with a reducer, at the same budgets; None: it has no reducer or budget."""
    if job.reducer is None:
        return None
    budgets = [budget for budget in budgets_for(job, resolve_model(job.model, job.tracking.uri)) if budget != BLIND]
    if not budgets:
        return None
    given = job.model_dump(mode="json", exclude_unset=True, context=AS_WRITTEN)
    model = {"reference": given.get("model", {}).get("reference", job.model.reference), "dtype": job.dtype}
    policy = {"policy": {"type": "fixed", "visual_tokens": budgets[0]}} if len(budgets) == 1 else {}
    data = {
        "kind": "serve",
        "name": job.name,
        "model": model,
        "reducer": given["reducer"],
        "budgets": {"offered": budgets, **policy},
        **{key: given[key] for key in ("tracking",) if key in given},
    }
    validate(ServeJob, data, "the selected trial")
    return data


def _write_job(path: Path, data: dict[str, Any], source: str) -> None:
    """Writes a job file that opens with its command and its source."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"# parcelray {data['kind']} {path}\n#\n# {source}\n"
        + yaml.safe_dump({"kind": data["kind"], **data}, sort_keys=False, allow_unicode=True),
        encoding="utf-8",
    )


def study_split_search(points: Mapping[int, EvaluatedPoint], evaluator: WarmEvaluator, metric: str) -> AdaptiveStudy:
    """Studies budgets chosen per image and question on the predictions of a split search.

    Each budget uses the split that the search chose for it. No new predictions are computed; only the signals of the
    images and questions are.

    Args:
        points: the evaluation of the chosen split by budget.
        evaluator: evaluator of the search.
        metric: `score` or `retention`, which becomes the score of the study.

    Raises:
        UserError: see `study_answers`; or the reference scores 0 on every split.
    """
    path = evaluator.models[evaluator.job.model.reference].path
    splits = _at_all_budgets(points)
    if metric == "retention":
        splits = _as_retention(splits, evaluator)
    config = config_of(path)
    connectors = {budget: connector_at(point.job, config, budget) for budget, point in sorted(points.items())}
    return study_answers(evaluator.job, splits, open_model(str(path), None), connectors)


def frontier_curves(study: AdaptiveStudy) -> dict[str, list[tuple[float, float]]]:
    """Returns the curves that the frontier of a search shows of an adaptive study, as points (visual tokens, score).

    The curves are the budget predictor, the escalation, and their baseline: random mixtures of the fixed budgets. The
    visual tokens are those of all passes.
    """
    fixed = [(point.spent.tokens.value, point.spent.score.value) for point in study.curve(FIXED)]
    tokens_B, scores_B = np.array(fixed).T
    at = np.geomspace(tokens_B.min(), tokens_B.max(), _MIXTURE_POINTS)
    mixed = best_mixture(at, np.tile(tokens_B[:, None], len(at)), np.tile(scores_B[:, None], len(at)))
    curves = {"mixture of the chosen splits": list(zip(at.tolist(), mixed.tolist(), strict=True))}
    for label, method in (("budget by predictor", BEFORE), (study.escalation, study.escalation)):
        curves[label] = [(point.spent.tokens.value, point.spent.score.value) for point in study.curve(method)]
    return curves


def _at_all_budgets(points: Mapping[int, EvaluatedPoint]) -> list[SplitScores]:
    """Returns the splits of one point with the predictions and scores of all points, which have the same samples."""
    named = {budget: {split.name: split for split in point.splits} for budget, point in points.items()}
    return [
        replace(
            split,
            answers={budget: splits[split.name].answers[budget] for budget, splits in named.items()},
            scores={budget: splits[split.name].scores[budget] for budget, splits in named.items()},
        )
        for split in next(iter(points.values())).splits
    ]


def _as_retention(splits: Sequence[SplitScores], evaluator: WarmEvaluator) -> list[SplitScores]:
    """Returns the splits on the scale of retention, without those where the reference scores 0."""
    reference, budget = evaluator.reference
    full = {split.name: split.scores[budget].estimate.value for split in reference}
    kept = [
        replace(split, scale=100 * split.scale / full[split.name]) for split in splits if full.get(split.name, 0) > 0
    ]
    if not kept:
        raise UserError(
            "The reference scores 0 on every split, so retention is undefined; evaluate more samples, or use `score` as"
            " the first objective."
        )
    return kept


def _splits(
    job: TuneJob, trials: Sequence[FinishedTrial], points: Mapping[int, EvaluatedPoint], evaluator: WarmEvaluator
) -> list[ChosenSplit]:
    constraint = job.splits
    assert constraint is not None
    estimates: dict[int, dict[int, Estimate]] = {}
    gflops: dict[int, dict[int, float]] = {}
    for index, point in points.items():
        for budget in point.budgets:
            grid = int(trials[index].assignment[constraint.anchor_grid])
            estimates.setdefault(budget, {})[grid] = evaluator.estimate(point, budget, _quality(job))
            gflops.setdefault(budget, {})[grid] = trials[index].metrics["gflops"]
    return choose_splits(estimates, gflops, _rule(constraint.patch_grid, sorted(estimates)))


def _adaptive(
    job: TuneJob,
    splits: Sequence[ChosenSplit],
    trials: Sequence[FinishedTrial],
    points: Mapping[int, EvaluatedPoint],
    evaluator: WarmEvaluator,
) -> tuple[AdaptiveStudy | None, str | None]:
    """Returns the adaptive study, or the reason why there is none.

    A reason is no error, because the other results of the search do not depend on the study.
    """
    assert job.splits is not None
    assert job.adaptive is not None
    chosen = {
        each.num_visual_tokens: each.anchor_grid for each in splits if each.num_visual_tokens in job.adaptive.budgets
    }
    evaluated = {
        budget: point
        for index, point in points.items()
        for budget in point.budgets
        if chosen.get(budget) == trials[index].assignment[job.splits.anchor_grid]
    }
    if len(evaluated) < 2:
        return (
            None,
            (
                f"{len(evaluated)} of the budgets {', '.join(map(str, job.adaptive.budgets))} have a finished trial; at"
                " least two are needed."
            ),
        )
    try:
        return study_split_search(evaluated, evaluator, job.objectives[0].metric), None
    except UserError as error:
        return None, str(error)


def _families(
    trials: Sequence[FinishedTrial], points: Mapping[int, EvaluatedPoint], evaluator: WarmEvaluator
) -> list[FamilyChoice]:
    estimates: dict[str, dict[int, Estimate]] = {}
    for index, point in points.items():
        for family in sorted({split.family for split in point.splits}):
            kept = mean_of([evaluator.estimate(point, budget, f"retention/{family}") for budget in point.budgets])
            if kept.n:
                estimates.setdefault(family, {})[index] = kept
    return choose_families(estimates, lambda index: (trials[index].metrics["tokens"], trials[index].metrics["gflops"]))


def _quality(job: TuneJob) -> str:
    """Returns the first objective that is a score or retention; `retention` if there is none."""
    return next((each.metric for each in job.objectives if each.metric.partition("/")[0] in SCORES), "retention")


def _rule(patch_grid: int, budgets: Sequence[int]) -> dict[int, int]:
    """Returns the anchor grid of the paper's rule for each budget that the rule covers."""
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


def _baseline_points(job: TuneJob, baseline: Baseline, evaluator: WarmEvaluator) -> list[BaselinePoint]:
    """Returns a baseline in the plane of the first two objectives, at its own costs.

    Points with an objective that is not measured for baselines, such as the latency, are left out.
    """
    points = []
    for budget in baseline.summary.budgets:
        values = [_of_baseline(each.metric, baseline, budget, evaluator) for each in job.objectives[:2]]
        y, *x = values
        if y is not None and x and x[0] is not None:
            points.append(BaselinePoint(x[0].value, y.value, y.low, y.high, budget))
    return points


def _of_baseline(metric: str, baseline: Baseline, budget: int, evaluator: WarmEvaluator) -> Interval | None:
    name, _, family = metric.partition("/")
    splits = [split for split in baseline.summary.splits if not family or split.family == family]
    if name == "retention":
        return mean_of(list(retentions(splits, budget, *evaluator.reference).values())).interval
    if name == "score":
        return mean_of([split.scores[budget].estimate for split in splits]).interval
    costs = prefill_costs(
        baseline.checkpoint, config_of(baseline.checkpoint).connector_config, budget, BYTES[evaluator.job.dtype]
    )
    return Interval(costs[name], costs[name], costs[name], 0) if name in costs else None
