"""Runs one search from its job file to its results; called by `parcelray tune` and the pipelines."""

import functools
import os
import random
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from parcelray.benchmarks.training_data import data_paths
from parcelray.cluster.capacity import await_capacity, read_capacity
from parcelray.cluster.node_inputs import check_inputs
from parcelray.cluster.session import ray_session
from parcelray.config.evaluate import EvaluateJob
from parcelray.config.model import CheckpointModelConfig
from parcelray.config.paths import written
from parcelray.config.space_checks import check_search_space_of
from parcelray.config.train import StorageLimits, TrainJob
from parcelray.config.tune import HyperBandScheduler, PbtAlgorithm, TuneJob
from parcelray.errors import SystemFailure, UserError
from parcelray.evaluation.run import limit_predictions, run_evaluation
from parcelray.evaluation.scoring.summary import Summary
from parcelray.files import is_local, open_storage
from parcelray.models.checkpoint import ResolvedCheckpoint
from parcelray.models.manifest import MANIFEST_NAME
from parcelray.models.vlm import connector_of
from parcelray.tracking.lineage import MODEL_IN_TAG
from parcelray.tracking.mlflow_tracker import job_run
from parcelray.tracking.registry import resolve_model
from parcelray.tracking.run_folder import RunFolder
from parcelray.tracking.store import ensure_store
from parcelray.tuning.evaluate_trial import Reference, WarmEvaluator
from parcelray.tuning.planner import Planner, make_planner
from parcelray.tuning.progress import SearchProgress, TrialRuns, bounds_of
from parcelray.tuning.report import record_findings, show_findings, write_findings
from parcelray.tuning.results import Baseline, SearchFindings, findings_of
from parcelray.tuning.training_points import train_point, training_resources
from parcelray.tuning.training_trial import early_stopping, population_scheduler, population_trial, training_trial
from parcelray.tuning.trial_record import RECORD_FILE, TrialRecord
from parcelray.tuning.trial_resources import TrialResources
from parcelray.tuning.tune_run import SearchObserver, evaluation_trial, run_search


@dataclass(frozen=True)
class SearchRun:
    """A finished search."""

    identity: str
    run_folder: RunFolder
    findings: SearchFindings
    mlflow_run_id: str | None

    @property
    def folder(self) -> Path:
        """Folder of this host with the results, the pictures, and for a split search the model."""
        return self.run_folder.local


def run_tuning(
    job: TuneJob,
    console: Console,
    *,
    address: str | None = None,
    resume: bool = False,
    retry_failed: bool = False,
    parent_run_id: str | None = None,
) -> SearchRun:
    """Runs a search, or resumes it.

    Args:
        job: the search.
        console: prints progress and results.
        address: address of the Ray cluster; None: RAY_ADDRESS, else a local instance.
        resume: whether the folder may contain finished trials, which are then skipped.
        retry_failed: whether failed trials are run again.
        parent_run_id: MLflow run under which the run of the search is nested.

    Raises:
        UserError: the job is not valid, its name belongs to another search, or there are finished trials and `resume`
            is False.
        SystemFailure: nothing computes, all trials failed, or the tracking store failed.
        KeyboardInterrupt: the search was interrupted; finished trials are kept.
    """
    check_search_space_of(job)
    uri = ensure_store(job.tracking.uri) if job.tracking.uri is not None else None
    models = searched_models(job, uri)
    run_folder = RunFolder(job)
    with run_folder.claimed({written(reference): model.pin.digest for reference, model in models.items()}):
        record = TrialRecord(run_folder.uri)
        if record.trials and not resume:
            raise UserError(
                f"{run_folder.uri} has {len(record.trials)} finished trials of this search; add --resume to continue"
                " it, or give the search another name."
            )
        if retry_failed:
            console.print(f"{record.forget_failed()} failed trials are run again")
        how_to_resume = f"re-run the same command{'' if resume else ' with --resume'} to continue"
        with (
            job_run(
                job,
                uri,
                run_folder.identity,
                params=_run_params(job),
                tags={MODEL_IN_TAG: ", ".join(model.pinned for model in models.values()) or "scratch"},
                parent_run_id=parent_run_id,
            ) as run_id,
            ray_session(address),
        ):
            check_inputs([model.pin for model in models.values()], _data_folders(job))
            planner = make_planner(job.space, job.algorithm, job.objectives, job.seed, record)
            search = _Search(job, console, record, planner, run_folder, models, uri, run_id, how_to_resume)
            evaluator = search.run()
            findings = findings_of(job, record.trials, evaluator, search.baselines(evaluator))
            files = write_findings(job, findings, run_folder.local)
            run_folder.push()
            if uri is not None and run_id is not None:
                record_findings(uri, run_id, findings, files)
            show_findings(job, findings, run_folder, console)
            if findings.failed and len(findings.failed) == len(findings.trials):
                raise SystemFailure(
                    f"All {len(findings.trials)} trials of {job.name} failed, the first with:"
                    f" {findings.failed[0].error}. Fix the cause, then re-run the same command with --resume"
                    " --retry-failed."
                )
        run_folder.finish(findings.to_dict())
        if isinstance(job.base, EvaluateJob):
            digests = [model.pin.digest for model in models.values()]
            limit_predictions(job.storage, job.base, digests, console)
        return SearchRun(run_folder.identity, run_folder, findings, run_id)


def searched_models(job: TuneJob, uri: str | None) -> dict[str, ResolvedCheckpoint]:
    """Returns the checkpoints that the results of a search depend on, by reference.

    These are the models that are evaluated or trained from, and the references of the retention.

    Args:
        job: the search.
        uri: URI of the model registry for references of the form `models:/...`.
    """
    named = [job.base.model, *(each.reference for each in (job.base, job.evaluation) if isinstance(each, EvaluateJob))]
    references = [each.reference for each in named if isinstance(each, CheckpointModelConfig)]
    domain = job.space.parameters.get("model.reference")
    values = domain.ends if domain is not None else ()
    references += [CheckpointModelConfig(reference=value).reference for value in values]
    models = {}
    for reference in dict.fromkeys(references):
        models[reference] = resolve_model(CheckpointModelConfig(reference=reference), uri)
    return models


@dataclass(frozen=True)
class _Search:
    """One session of a search: runs the missing trials, and evaluates the models they are compared with."""

    job: TuneJob
    console: Console
    record: TrialRecord
    planner: Planner
    folder: RunFolder
    models: Mapping[str, ResolvedCheckpoint]
    uri: str | None
    run_id: str | None
    how_to_resume: str
    """Advice on how to resume after an interruption, for a message."""

    def run(self) -> WarmEvaluator | None:
        """Runs the missing trials.

        Returns:
            The evaluator, which can score all points again from their predictions; None if the trials are trainings.
        """
        resources = trial_resources(self.job)
        # A search that the cluster cannot run is refused before the reference is evaluated, which may take long.
        count = 0 if self.planner.is_finished else self._concurrency(resources)
        if isinstance(self.job.base, EvaluateJob):
            evaluator = self._evaluator(self.job.base.model_copy(update={"storage": self.job.storage}))
            trial = evaluation_trial(evaluator.metrics, self.job.objectives[0])
            self._search(trial, resources, count, costs=evaluator.bounds(), reuse_actors=True)
            return evaluator
        self._run_trainings(self.job.base, resources, count)
        return None

    def _concurrency(self, resources: TrialResources) -> int:
        """Waits for the resources of one trial, or of a whole population; returns how many trials run at once."""
        need = resources.need
        if isinstance(self.job.algorithm, PbtAlgorithm):
            members = need.times(self.job.algorithm.population)
            need = replace(members, subject="The population", remedy=f"lower algorithm.population, {need.remedy}")
        await_capacity(
            need,
            self.job.wait_s,
            "wait_s",
            lambda line: self.console.print(line, markup=False, soft_wrap=True),
        )
        return resources.concurrency(read_capacity(), wanted_concurrency(self.job))

    def baselines(self, evaluator: WarmEvaluator | None) -> dict[str, Baseline]:
        """Evaluates the baselines whose checkpoints exist, at the searched budgets that they support."""
        if evaluator is None:
            return {}
        budgets = sorted({int(trial.metrics["tokens"]) for trial in self.record.trials if "tokens" in trial.metrics})
        baselines = {}
        for name, reference in self.job.baselines.items():
            if _is_missing(reference):
                self.console.print(f"Baseline {name} is left out: {reference} does not exist")
                continue
            checkpoint = resolve_model(CheckpointModelConfig(reference=reference), self.uri)
            legal = [budget for budget in budgets if budget in connector_of(checkpoint.path).supported_budgets]
            summary = self._evaluation(evaluator.job, name, reference, tuple(legal))
            baselines[name] = Baseline(summary, checkpoint.path)
        return baselines

    def _run_trainings(self, base: TrainJob, resources: TrialResources, count: int) -> None:
        reference = self._reference(self.job.evaluation)
        pins = {name: model.pin for name, model in self.models.items()}
        train = functools.partial(
            train_point, self.job, self.folder.uri, reference, pins=pins, working_folder=os.getcwd()
        )
        first = self.job.objectives[0]
        if isinstance(self.job.algorithm, PbtAlgorithm):
            # Tune uses Python's global generator to choose the member to copy.
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
        scheduler = early_stopping(self.job.early_stopping, total, self.folder.uri)
        if (
            isinstance(self.job.early_stopping, HyperBandScheduler)
            and self.record.trials
            and not self.planner.is_finished
        ):
            self.console.print(
                "HyperBand compares only trainings of one session: the remaining ones form new brackets",
            )
        # Every trial runs in a new process, so that no GPU memory of the previous one remains in use (ray#23971).
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
        observers: list[SearchObserver] = [SearchProgress(self.job, self.planner, self.record, self.console, bounds)]
        with ExitStack() as stack:
            if self.uri is not None and self.run_id is not None:
                # Also if no trial is left to run: an earlier driver may have been killed after recording a trial, but
                # before writing it to MLflow.
                observers.append(
                    stack.enter_context(TrialRuns(self.job, self.uri, self.run_id, self.record.trials, bounds))
                )
            if self.planner.is_finished:
                return
            num_finished = len(self.record.trials)
            if num_finished:
                self.console.print(
                    f"Resuming from {self.folder.uri}/{RECORD_FILE}; Ray Tune's own state of earlier sessions is"
                    " ignored",
                )
            finished = f", {num_finished} of them finished" if num_finished else ""
            self.console.print(
                f"{self.job.name}: {self.planner.num_points} trials{finished}, {count} at the same time",
            )
            try:
                run_search(
                    trainable,
                    self.planner,
                    self.record,
                    observers,
                    folder=self.folder.uri,
                    resources=resources,
                    max_concurrent=count,
                    scheduler=scheduler,
                    reuse_actors=reuse_actors,
                    stall_s=self.job.stall_s,
                )
            except KeyboardInterrupt:
                num_finished = len(self.record.trials)
                self.console.print(
                    f"Interrupted. {num_finished} of {self.planner.num_points} trials are finished and kept;"
                    f" {self.how_to_resume}.",
                )
                raise

    def _reference(self, job: EvaluateJob | None) -> Reference:
        """Returns the scores of the reference model with all visual tokens; empty if the evaluation has no reference.

        A search over evaluations without a reference uses its own model.
        """
        if job is None:
            return (), 0
        model = job.reference or (job.model if isinstance(self.job.base, EvaluateJob) else None)
        if model is None:
            return (), 0
        summary = self._evaluation(job, "reference", model.reference, ("full",))
        return summary.splits, max(summary.budgets)

    def _evaluator(self, base: EvaluateJob) -> WarmEvaluator:
        return WarmEvaluator(
            job=base,
            models=self.models,
            reference=self._reference(base),
            measure_latency=_measures_latency(self.job),
        )

    def _evaluation(self, base: EvaluateJob, name: str, reference: str, budgets: tuple[int | str, ...]) -> Summary:
        """Evaluates another model on the samples of the search."""
        slug = "".join(letter if letter.isalnum() else "_" for letter in name.lower())
        changes = {
            "name": f"{self.job.name}-{slug}"[:63],
            "model": CheckpointModelConfig(reference=reference),
            "reference": None,
            "reducer": None,
            "anchor_grid": None,
            "budgets": budgets,
            "tracking": base.tracking.model_copy(update={"uri": self.uri}),
            "storage": self.job.storage,
            # The limits apply at the end of the search, when its predictions are no longer needed.
            "storage_limits": StorageLimits(),
        }
        job = EvaluateJob.model_validate(base.model_dump() | changes)
        return run_evaluation(job, self.console, parent_run_id=self.run_id, tables=False).summary


def _is_missing(reference: str) -> bool:
    """Whether a reference is a path, or a URI of object storage, without a model."""
    if "/" not in reference or reference.startswith(("models:/", "hf:")):
        return False
    filesystem, path = open_storage(reference)
    return not filesystem.exists(f"{path}/{MANIFEST_NAME}" if not is_local(filesystem) else path)


def trial_resources(job: TuneJob) -> TrialResources:
    """Returns the resources of a trial."""
    if isinstance(job.base, TrainJob):
        return training_resources(job)
    return TrialResources(cpus=job.base.compute.cpus_per_actor, gpus=job.base.compute.gpus_per_actor)


def wanted_concurrency(job: TuneJob) -> int | None:
    """Returns the largest number of trials at the same time; None: as many as the cluster can run."""
    if _measures_latency(job):
        # Another trial on the same machine would slow the model down.
        return 1
    if isinstance(job.base, TrainJob):
        return job.max_concurrent
    # Each trial that runs at the same time holds a copy of the model.
    actors = max(1, job.base.compute.actors)
    return min(actors, job.max_concurrent or actors)


def _data_folders(job: TuneJob) -> list[str | None]:
    """Returns the folders and files that the trials read data from."""
    evaluations = [each for each in (job.base, job.evaluation) if isinstance(each, EvaluateJob)]
    trained = data_paths(job.base.data) if isinstance(job.base, TrainJob) else ()
    return [*trained, *(choice.data for each in evaluations for choice in each.benchmarks)]


def _measures_latency(job: TuneJob) -> bool:
    return any(objective.metric == "latency_ms" for objective in job.objectives)


def _run_params(job: TuneJob) -> dict[str, Any]:
    """Parameters of the search's MLflow run."""
    params = job.model_dump(mode="json", include={"name", "seed", "algorithm", "early_stopping"})
    params |= {"space": job.space.name, "parameters": ", ".join(job.space.parameters), "points": job.space.size}
    return params | {"objectives": ", ".join(f"{each.mode} {each.metric}" for each in job.objectives)}
