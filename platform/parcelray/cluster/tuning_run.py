"""One search from its file to a frontier, a chosen configuration and a record: what `parcelray tune` and the pipelines call."""

import functools
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from parcelray.cluster.evaluation_run import run_evaluation
from parcelray.cluster.provenance import flat_params, git_commit, resolve_model
from parcelray.cluster.session import ray_session
from parcelray.cluster.training_run import run_training
from parcelray.cluster.tuning_progress import Observers, SearchProgress, TrialRuns
from parcelray.cluster.tuning_results import SearchFindings, findings_of, record_findings, show_findings, write_findings
from parcelray.cluster.warm_evaluation import WarmEvaluator
from parcelray.config.evaluate import EvaluateJob
from parcelray.config.loader import check_search_space_of, config_hash, set_key, validate
from parcelray.config.model import CheckpointModelConfig
from parcelray.config.search_space import Assignment
from parcelray.config.train import TrainJob
from parcelray.config.tune import PbtAlgorithm, TuneJob
from parcelray.errors import UserError
from parcelray.evaluation.bundles import PassSettings
from parcelray.evaluation.summary import Summary
from parcelray.models.checkpoint import content_digest
from parcelray.tracking.mlflow_tracker import tracked_run
from parcelray.tracking.store import ensure_store
from parcelray.training.run_folder import RunFolder
from parcelray.tuning.planner import Planner, make_planner
from parcelray.tuning.trial_record import TrialRecord, point_key
from parcelray.tuning.tune_run import TrialResources, evaluation_trial, run_search


@dataclass(frozen=True)
class SearchRun:
    """A finished search."""

    identity: str
    folder: Path
    findings: SearchFindings
    mlflow_run_id: str | None


def run_tuning(
    job: TuneJob,
    console: Console,
    *,
    address: str | None = None,
    resume: bool = False,
    retry_failed: bool = False,
    parent_run_id: str | None = None,
) -> SearchRun:
    """Runs a search, or goes on with it.

    Args:
        job: the search.
        console: for progress and results.
        address: Ray cluster; None: RAY_ADDRESS, else a local instance.
        resume: whether trials that are finished may be there; they are not run again.
        retry_failed: whether those that failed are.
        parent_run_id: MLflow run to nest under.

    Raises:
        UserError: the search cannot run as it is written, its name belongs to another one, or there are trials and `resume` is off.
        SystemFailure: trials wait, and none runs.
        KeyboardInterrupt: it was interrupted; what is finished is kept.
    """
    check_search_space_of(job)
    run_folder = RunFolder(job)
    run_folder.claim()
    folder = run_folder.local_path("")
    record = TrialRecord(folder)
    if record.trials and not resume:
        raise UserError(f"{folder} has {len(record.trials)} finished trials of this search; add --resume to go on, or give the search another name.")
    if retry_failed:
        console.print(f"{record.forget_failed()} failed trials are run again", highlight=False)
    uri = ensure_store(job.tracking.uri) if job.tracking.uri is not None else None
    with _tracked(job, run_folder, uri, parent_run_id) as run_id, ray_session(address) as session:
        planner = make_planner(job.space, job.algorithm, job.objectives, job.seed, record)
        searched = _Search(job, console, record, planner, folder, session.resources, uri, run_id)
        evaluator = searched.run()
        findings = findings_of(job, record.trials, evaluator, searched.rivals())
        files = write_findings(job, findings, folder)
        if uri is not None and run_id is not None:
            record_findings(uri, run_id, findings, files)
    show_findings(job, findings, folder, console)
    run_folder.finish(findings.to_dict())
    return SearchRun(run_folder.identity, folder, findings, run_id)


@dataclass(frozen=True)
class _Search:
    """The trials of a search."""

    job: TuneJob
    console: Console
    record: TrialRecord
    planner: Planner
    folder: Path
    total: Mapping[str, float]
    """Resources of the cluster."""
    uri: str | None
    run_id: str | None

    def run(self) -> WarmEvaluator | None:
        """Runs what is missing; returns what scores points again from their answers, None for trainings."""
        if isinstance(self.job.base, EvaluateJob):
            evaluator = self._evaluator(self.job.base)
            self._run_evaluations(evaluator)
            return evaluator
        self._run_trainings(self.job.base)
        return None

    def rivals(self) -> dict[str, Summary]:
        """Evaluations of the rivals that are there, at those of the searched budgets that they can give."""
        if not isinstance(self.job.base, EvaluateJob):
            return {}
        budgets = sorted({int(trial.metrics["tokens"]) for trial in self.record.trials if "tokens" in trial.metrics})
        found = {}
        for name, reference in self.job.rivals.items():
            if not Path(reference).exists() and "/" in reference and not reference.startswith(("models:/", "hf:")):
                self.console.print(f"{name}: {reference} is not there, so it is not in the figure", highlight=False)
                continue
            checkpoint = resolve_model(CheckpointModelConfig(reference=reference), self.uri)
            legal = [budget for budget in budgets if budget in _supported(checkpoint.path)]
            found[name] = self._evaluation(name, reference, tuple(legal))
        return found

    def _run_evaluations(self, evaluator: WarmEvaluator) -> None:
        if self.planner.is_finished:
            return
        compute = evaluator.job.compute
        resources = TrialResources(cpus=compute.cpus_per_actor, gpus=compute.gpus_per_actor)
        # Each trial at the same time is a copy of the model.
        wanted = min(max(1, compute.actors), self.job.max_concurrent or max(1, compute.actors))
        count = resources.concurrency(self.total, wanted)
        self._search(evaluation_trial(functools.partial(_measure, evaluator), self.job.objectives[0]), resources, count, reuse_actors=True)

    def _run_trainings(self, base: TrainJob) -> None:
        from parcelray.tuning.training_trial import early_stopping, population_scheduler, population_trial, training_trial, worker_resources

        if self.planner.is_finished:
            return
        scaling = base.scaling
        resources = worker_resources(scaling.bounds[1], scaling.cpus_per_worker, scaling.gpus_per_worker, scaling.data_tasks_per_worker)
        count = resources.concurrency(self.total, self.job.max_concurrent)
        train = functools.partial(train_point, self.job, str(self.folder))
        first = self.job.objectives[0]
        if isinstance(self.job.algorithm, PbtAlgorithm):
            if count < self.job.algorithm.population:
                raise UserError(
                    f"algorithm.population is {self.job.algorithm.population}, but the cluster holds {count} trainings at the same time; "
                    "make it smaller, give the trainings fewer workers, or use a larger cluster."
                )
            # Tune draws mutations from the module's generator.
            random.seed(self.job.seed)
            trial = population_trial(train, self.job.space, first, self.job.algorithm)
            self._search(trial, resources, count, scheduler=population_scheduler(self.job.space, self.job.algorithm))
            return
        scheduler = early_stopping(self.job.early_stopping, base.training.steps)
        # A new process for every trial: memory of a GPU that the last one left behind is gone with it (ray#23971).
        self._search(training_trial(train, first), resources, count, scheduler=scheduler)

    def _search(self, trainable: Any, resources: TrialResources, count: int, *, scheduler: Any = None, reuse_actors: bool = False) -> None:
        progress = SearchProgress(self.job, self.planner, self.record, self.console)
        members: list[SearchProgress | TrialRuns] = [progress]
        if self.uri is not None and self.run_id is not None:
            members.append(TrialRuns(self.job, self.uri, self.run_id, self.record.trials))
        there = len(self.record.trials)
        known = f", {there} of them finished" if there else ""
        self.console.print(f"{self.job.name}: {self.planner.num_points} trials{known}, {count} at the same time", highlight=False)
        try:
            run_search(
                trainable,
                self.planner,
                self.record,
                Observers(members),
                folder=self.folder,
                resources=resources,
                max_concurrent=count,
                scheduler=scheduler,
                reuse_actors=reuse_actors,
                stall_s=self.job.stall_s,
            )
        except KeyboardInterrupt:
            done = len(self.record.trials)
            self.console.print(
                f"Stopped. {done} of {self.planner.num_points} trials are finished and kept; the same command with --resume goes on.", highlight=False
            )
            raise
        finally:
            for member in members:
                member.close()

    def _evaluator(self, base: EvaluateJob) -> WarmEvaluator:
        checkpoint = resolve_model(base.model, self.uri)
        reference = self._evaluation("reference", (base.reference or base.model).reference, ("full",))
        storage = base.storage if "://" in base.storage else os.path.abspath(base.storage)
        return WarmEvaluator(
            job=base.model_copy(update={"storage": storage}),
            checkpoint=checkpoint,
            digest=content_digest(checkpoint.path),
            reference=(reference.splits, max(reference.budgets)),
            settings=PassSettings(**base.compute.model_dump()),
            measure_latency=any(objective.metric == "latency_ms" for objective in self.job.objectives),
        )

    def _evaluation(self, name: str, reference: str, budgets: tuple[int | str, ...]) -> Summary:
        """Another model on the questions of the search."""
        base = self.job.base
        assert isinstance(base, EvaluateJob)
        slug = "".join(letter if letter.isalnum() else "_" for letter in name.lower())
        changes = {
            "name": f"{self.job.name}-{slug}"[:63],
            "model": CheckpointModelConfig(reference=reference),
            "reference": None,
            "reducer": None,
            "anchor_grid": None,
            "budgets": budgets,
            "tracking": base.tracking.model_copy(update={"uri": self.uri}),
        }
        job = EvaluateJob.model_validate(base.model_dump() | changes)
        return run_evaluation(job, self.console, parent_run_id=self.run_id, tables=False).summary


def train_point(job: TuneJob, folder: str, assignment: Assignment, on_report: Any, *, model: str | None = None, part: int = 1) -> tuple[dict[str, float], str]:
    """See `TrainPoint`."""
    training = trial_job(job, folder, assignment, model=model, part=part)
    with open(os.devnull, "w") as nowhere:
        run = run_training(training, Console(file=nowhere), on_report=on_report, report=False)
    return run.metrics | {"step": float(training.training.steps)}, str(run.model_folder)


def trial_job(job: TuneJob, folder: str, assignment: Assignment, *, model: str | None = None, part: int = 1) -> TrainJob:
    """The training of a point; its run folder is below the search's, so that one that was paused or lost goes on from its newest checkpoint.

    Args:
        job: the search.
        folder: of the search.
        assignment: the point.
        model: checkpoint to start from instead of the job's.
        part: the job's steps are divided by it.
    """
    base = job.base
    assert isinstance(base, TrainJob)
    data = base.model_dump(mode="json", exclude_unset=True)
    for key, value in assignment.items():
        set_key(data, key, value, "the search")
    if model is not None:
        data["model"] = {"type": "checkpoint", "reference": model}
        # The connector came with the first segment.
        data["connector"] = None
    data["training"]["steps"] = max(1, base.training.steps // part)
    # The driver records the trial; a training's own run would be a second one.
    data["tracking"] = {"uri": None}
    data["report"] = None
    data["storage"] = os.path.abspath(f"{folder}/trials")
    changed = validate(TrainJob, data, "the search")
    return changed.model_copy(update={"name": f"{point_key(assignment)}-{config_hash(changed)}"})


def _measure(evaluator: WarmEvaluator) -> Any:
    return evaluator.metrics


def _supported(checkpoint: Path) -> tuple[int, ...]:
    from parcelray.models.vlm import connector_of

    return tuple(connector_of(checkpoint).supported_budgets)


@contextmanager
def _tracked(job: TuneJob, folder: RunFolder, uri: str | None, parent_run_id: str | None) -> Iterator[str | None]:
    if uri is None:
        with nullcontext():
            yield None
        return
    params = flat_params(job.model_dump(mode="json", include={"name", "seed", "algorithm", "early_stopping"}))
    params |= {"space": job.space.name, "parameters": ", ".join(job.space.parameters), "points": job.space.size}
    params |= {"objectives": ", ".join(f"{each.mode} {each.metric}" for each in job.objectives)}
    tags = {"parcel.config_hash": config_hash(job)}
    commit = git_commit()
    if commit is not None:
        tags["mlflow.source.git.commit"] = commit
    with tracked_run(uri, job.tracking.experiment, folder.identity, params=params, tags=tags, parent_run_id=parent_run_id) as run_id:
        yield run_id
