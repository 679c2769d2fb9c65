"""One search from its file to a frontier, a chosen configuration and a record: what `parcelray tune` and the pipelines call."""

import functools
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from parcelray.cluster.session import ray_session
from parcelray.config.evaluate import EvaluateJob
from parcelray.config.identity import config_hash
from parcelray.config.model import CheckpointModelConfig
from parcelray.config.space_checks import check_search_space_of
from parcelray.config.train import TrainJob
from parcelray.config.tune import HyperBandScheduler, PbtAlgorithm, TuneJob
from parcelray.errors import SystemFailure, UserError
from parcelray.evaluation.passes.shards import PassSettings
from parcelray.evaluation.run import run_evaluation
from parcelray.evaluation.scoring.summary import Summary
from parcelray.models.checkpoint import content_digest
from parcelray.models.vlm import connector_of
from parcelray.tracking.mlflow_tracker import tracked_run
from parcelray.tracking.provenance import flat_params, git_commit, resolve_model
from parcelray.tracking.run_folder import RunFolder
from parcelray.tracking.store import ensure_store
from parcelray.tuning.evaluate_trial import Reference, SearchedModel, WarmEvaluator
from parcelray.tuning.planner import Planner, make_planner
from parcelray.tuning.progress import Observers, SearchProgress, TrialRuns, bounds_of
from parcelray.tuning.results import Rival, SearchFindings, findings_of, record_findings, show_findings, write_findings
from parcelray.tuning.training_points import train_point, training_resources
from parcelray.tuning.training_trial import early_stopping, population_scheduler, population_trial, training_trial
from parcelray.tuning.trial_record import TrialRecord
from parcelray.tuning.trial_resources import TrialResources, cluster_nodes
from parcelray.tuning.tune_run import evaluation_trial, run_search


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
        UserError: the search cannot run as it is written, its name belongs to another one, or there are trials and
            `resume` is off.
        SystemFailure: nothing computes, all trials failed, or MLflow did not take what it was told.
        KeyboardInterrupt: it was interrupted; what is finished is kept.
    """
    check_search_space_of(job)
    uri = ensure_store(job.tracking.uri) if job.tracking.uri is not None else None
    models = searched_models(job, uri)
    run_folder = RunFolder(job)
    run_folder.claim({reference: model.digest for reference, model in models.items()})
    folder = run_folder.local_path("")
    record = TrialRecord(folder)
    if record.trials and not resume:
        raise UserError(
            f"{folder} has {len(record.trials)} finished trials of this search; add --resume to go on, or give the"
            " search another name."
        )
    if retry_failed:
        console.print(f"{record.forget_failed()} failed trials are run again", highlight=False)
    again = "the same command goes on" if resume else "the same command with --resume goes on"
    with _tracked(job, run_folder, uri, parent_run_id) as run_id, ray_session(address):
        planner = make_planner(job.space, job.algorithm, job.objectives, job.seed, record)
        searched = _Search(job, console, record, planner, folder, models, uri, run_id, again)
        evaluator = searched.run()
        findings = findings_of(job, record.trials, evaluator, searched.rivals(evaluator))
        files = write_findings(job, findings, folder)
        if uri is not None and run_id is not None:
            record_findings(uri, run_id, findings, files)
        show_findings(job, findings, folder, console)
        if findings.failed and len(findings.failed) == len(findings.trials):
            raise SystemFailure(
                f"All {len(findings.trials)} trials of {job.name} failed, the first with: {findings.failed[0].error}."
                " Mend it; --resume --retry-failed runs them again."
            )
    run_folder.finish(findings.to_dict())
    return SearchRun(run_folder.identity, folder, findings, run_id)


def searched_models(job: TuneJob, uri: str | None) -> dict[str, SearchedModel]:
    """The checkpoints that the search's results hang on, by reference: those that are asked or started from, and what they are compared with.

    Args:
        job: the search.
        uri: of the registry that `models:/...` is looked up in.
    """
    named = [job.base.model, *(each.reference for each in (job.base, job.evaluation) if isinstance(each, EvaluateJob))]
    references = [each.reference for each in named if isinstance(each, CheckpointModelConfig)]
    domain = job.space.parameters.get("model.reference")
    references += list(domain.ends) if domain is not None else []
    found = {}
    for reference in dict.fromkeys(map(str, references)):
        checkpoint = resolve_model(CheckpointModelConfig(reference=reference), uri)
        found[reference] = SearchedModel(checkpoint, content_digest(checkpoint.path))
    return found


@dataclass(frozen=True)
class _Search:
    """The trials of a search."""

    job: TuneJob
    console: Console
    record: TrialRecord
    planner: Planner
    folder: Path
    models: Mapping[str, SearchedModel]
    uri: str | None
    run_id: str | None
    again: str
    """How to go on after an interruption."""

    def run(self) -> WarmEvaluator | None:
        """Runs what is missing; returns what scores points again from their answers, None for trainings."""
        resources = trial_resources(self.job)
        # Refused before the reference is evaluated, which may take long.
        count = (
            resources.concurrency(cluster_nodes(), wanted_concurrency(self.job)) if not self.planner.is_finished else 0
        )
        if isinstance(self.job.base, EvaluateJob):
            evaluator = self._evaluator(self.job.base)
            trial = evaluation_trial(evaluator.metrics, self.job.objectives[0])
            self._search(trial, resources, count, costs=evaluator.bounds(), reuse_actors=True)
            return evaluator
        self._run_trainings(self.job.base, resources, count)
        return None

    def rivals(self, evaluator: WarmEvaluator | None) -> dict[str, Rival]:
        """Evaluations of the rivals that are there, at those of the searched budgets that they can give."""
        if evaluator is None:
            return {}
        budgets = sorted({int(trial.metrics["tokens"]) for trial in self.record.trials if "tokens" in trial.metrics})
        found = {}
        for name, reference in self.job.rivals.items():
            if not Path(reference).exists() and "/" in reference and not reference.startswith(("models:/", "hf:")):
                self.console.print(f"{name}: {reference} is not there, so it is not in the figure", highlight=False)
                continue
            checkpoint = resolve_model(CheckpointModelConfig(reference=reference), self.uri)
            legal = [budget for budget in budgets if budget in connector_of(checkpoint.path).supported_budgets]
            found[name] = Rival(self._evaluation(evaluator.job, name, reference, tuple(legal)), checkpoint.path)
        return found

    def _run_trainings(self, base: TrainJob, resources: TrialResources, count: int) -> None:
        train = functools.partial(train_point, self.job, str(self.folder), self._reference(self.job.evaluation))
        first = self.job.objectives[0]
        if isinstance(self.job.algorithm, PbtAlgorithm):
            if count and count < self.job.algorithm.population:
                raise UserError(
                    f"algorithm.population is {self.job.algorithm.population}, but the cluster holds {count} trainings"
                    " at the same time; make it smaller, give the trainings fewer workers, or use a larger cluster."
                )
            # Tune chooses whom to copy with the module's generator.
            random.seed(self.job.seed)
            trial = population_trial(train, first, self.job.algorithm)
            self._search(
                trial,
                resources,
                count,
                scheduler=population_scheduler(self.job.space, self.job.algorithm, self.job.seed),
            )
            return
        steps = self.job.space.parameters.get("training.steps")
        total = max(steps.ends) if steps is not None else base.training.steps
        scheduler = early_stopping(self.job.early_stopping, total, self.folder)
        if (
            isinstance(self.job.early_stopping, HyperBandScheduler)
            and self.record.trials
            and not self.planner.is_finished
        ):
            self.console.print(
                "HyperBand compares trainings that wait for each other: those that are left form brackets of their own",
                highlight=False,
            )
        # A new process for every trial: memory of a GPU that the last one left behind is gone with it (ray#23971).
        self._search(training_trial(train, first), resources, count, scheduler=scheduler)

    def _search(
        self,
        trainable: Any,
        resources: TrialResources,
        count: int,
        *,
        costs: Mapping[str, tuple[float, float]] | None = None,
        scheduler: Any = None,
        reuse_actors: bool = False,
    ) -> None:
        bounds = bounds_of(self.job.objectives, costs or {})
        members: list[SearchProgress | TrialRuns] = [
            SearchProgress(self.job, self.planner, self.record, self.console, bounds)
        ]
        with ExitStack() as written:
            if self.uri is not None and self.run_id is not None:
                # Also where nothing is left to run: a driver that was killed may have recorded more than it told
                # MLflow.
                members.append(
                    written.enter_context(TrialRuns(self.job, self.uri, self.run_id, self.record.trials, bounds))
                )
            if self.planner.is_finished:
                return
            there = len(self.record.trials)
            known = f", {there} of them finished" if there else ""
            self.console.print(
                f"{self.job.name}: {self.planner.num_points} trials{known}, {count} at the same time", highlight=False
            )
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
                    f"Stopped. {done} of {self.planner.num_points} trials are finished and kept; {self.again}.",
                    highlight=False,
                )
                raise

    def _reference(self, job: EvaluateJob | None) -> Reference:
        """Of an evaluation, the uncompressed model's scores; none where retention is not asked for."""
        model = (job.reference or (job.model if job is self.job.base else None)) if job is not None else None
        if job is None or model is None:
            return (), 0
        found = self._evaluation(job, "reference", model.reference, ("full",))
        return found.splits, max(found.budgets)

    def _evaluator(self, base: EvaluateJob) -> WarmEvaluator:
        storage = base.storage if "://" in base.storage else os.path.abspath(base.storage)
        return WarmEvaluator(
            job=base.model_copy(update={"storage": storage}),
            models=self.models,
            reference=self._reference(base),
            settings=PassSettings(**base.compute.model_dump()),
            measure_latency=_measures_latency(self.job),
        )

    def _evaluation(self, base: EvaluateJob, name: str, reference: str, budgets: tuple[int | str, ...]) -> Summary:
        """Another model on the questions of the search."""
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


def trial_resources(job: TuneJob) -> TrialResources:
    """What a trial of a search takes."""
    if isinstance(job.base, TrainJob):
        return training_resources(job)
    return TrialResources(cpus=job.base.compute.cpus_per_actor, gpus=job.base.compute.gpus_per_actor)


def wanted_concurrency(job: TuneJob) -> int | None:
    """How many trials at the same time a search wants at most; None: as many as the cluster holds."""
    if _measures_latency(job):
        # Beside another one a model is slower than it is.
        return 1
    if isinstance(job.base, TrainJob):
        return job.max_concurrent
    # Each trial at the same time is a copy of the model.
    actors = max(1, job.base.compute.actors)
    return min(actors, job.max_concurrent or actors)


def _measures_latency(job: TuneJob) -> bool:
    return any(objective.metric == "latency_ms" for objective in job.objectives)


@contextmanager
def _tracked(job: TuneJob, folder: RunFolder, uri: str | None, parent_run_id: str | None) -> Iterator[str | None]:
    if uri is None:
        yield None
        return
    params = flat_params(job.model_dump(mode="json", include={"name", "seed", "algorithm", "early_stopping"}))
    params |= {"space": job.space.name, "parameters": ", ".join(job.space.parameters), "points": job.space.size}
    params |= {"objectives": ", ".join(f"{each.mode} {each.metric}" for each in job.objectives)}
    tags = {"parcel.config_hash": config_hash(job)}
    commit = git_commit()
    if commit is not None:
        tags["mlflow.source.git.commit"] = commit
    with tracked_run(
        uri, job.tracking.experiment, folder.identity, params=params, tags=tags, parent_run_id=parent_run_id
    ) as run_id:
        yield run_id
