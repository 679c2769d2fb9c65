"""A point of a search over trainings: its job, its training, and the metrics of the trained model."""

import itertools
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from parcelray.config.identity import config_hash
from parcelray.config.loader import changed, validate
from parcelray.config.model import CheckpointModelConfig
from parcelray.config.paths import WITH_TEXT
from parcelray.config.search_space import Assignment
from parcelray.config.train import TrainJob
from parcelray.config.tune import TuneJob
from parcelray.models.checkpoint import ModelPin, ResolvedCheckpoint, resolve_checkpoint
from parcelray.models.vlm import config_of, connector_of
from parcelray.training.run import run_training
from parcelray.tuning.evaluate_trial import Reference, WarmEvaluator, prefill_costs
from parcelray.tuning.training_trial import WHOLE, Segment, worker_resources
from parcelray.tuning.trial_record import point_key
from parcelray.tuning.trial_resources import TrialResources

_CACHE_BYTES = 2
"""Bytes of one value in the KV cache: models are served in bf16."""


def changed_training(job: TuneJob, assignment: Assignment, working_folder: str | None = None) -> TrainJob:
    """Returns the training job of the search with the values of a point.

    Args:
        job: the search.
        assignment: the values.
        working_folder: folder that relative paths among the values are relative to; None: that of this process.

    Raises:
        ConfigError: the training job does not accept one of the values.
    """
    assert isinstance(job.base, TrainJob)
    return changed(job.base, assignment, "the search", folder=working_folder)


def trial_job(
    job: TuneJob,
    folder: str,
    assignment: Assignment,
    *,
    segment: Segment = WHOLE,
    working_folder: str | None = None,
) -> TrainJob:
    """Returns the training job of a point.

    Its run folder is inside the search's, so a trial that was paused or lost resumes from its newest checkpoint.

    Args:
        job: the search.
        folder: run folder of the search, or its URI.
        assignment: values that the point sets in the training job.
        segment: the part of the training to run.
        working_folder: see `changed_training`.
    """
    whole = changed_training(job, assignment, working_folder)
    data = whole.model_dump(mode="json", exclude_unset=True, context=WITH_TEXT)
    if segment.model is not None:
        data["model"] = {"type": "checkpoint", "reference": segment.model}
        # The checkpoint of the first segment contains the connector.
        data["connector"] = None
    if segment.index + 1 < segment.count:
        # The next segment starts from this one's model, so rounding it would lose small updates.
        data["checkpointing"] = data.get("checkpointing", {}) | {"model_dtype": None}
    before, end = segment.steps(whole.training.steps)
    data["training"]["steps"] = max(1, end - before)
    # The same seed would train every segment on the same batches and budgets.
    data["seed"] = whole.seed + segment.index
    # The driver of the search records the trial; a run of the training itself would be a duplicate.
    data["tracking"] = {"uri": None}
    data["report"] = data["register"] = None
    data["storage"] = f"{folder}/trials" if "://" in folder else os.path.abspath(f"{folder}/trials")
    part = validate(TrainJob, data, "the search")
    return part.model_copy(update={"name": f"{point_key(assignment)}-{config_hash(part)}"})


def train_point(
    job: TuneJob,
    folder: str,
    reference: Reference,
    assignment: Assignment,
    on_report: Any,
    *,
    segment: Segment = WHOLE,
    pins: Mapping[str, ModelPin] | None = None,
    working_folder: str | None = None,
) -> tuple[dict[str, float], str]:
    """Trains a point and measures the trained model (see `TrainPoint`).

    Args:
        job: the search.
        folder: run folder of the search, or its URI.
        reference: scores of the uncompressed model, for the retention of `job.evaluation`.
        assignment: values that the point sets in the training job.
        on_report: called at each checkpoint except the last.
        segment: the part of the training to run.
        pins: models that the trainings start from, by reference; others are resolved by the trial.
        working_folder: working folder of the driver, see `changed_training`.
    """
    training = trial_job(job, folder, assignment, segment=segment, working_folder=working_folder)
    start = training.model.reference if isinstance(training.model, CheckpointModelConfig) else ""
    with open(os.devnull, "w") as nowhere:
        run = run_training(
            training,
            Console(file=nowhere),
            on_report=BeforeTheEnd(on_report, training.training.steps),
            report=False,
            start_pin=(pins or {}).get(start),
            wait=False,
        )
    before, _ = segment.steps(changed_training(job, assignment, working_folder).training.steps)
    metrics = run.metrics | _costs(training, run.model_folder) | {"step": float(before + training.training.steps)}
    if job.evaluation is not None:
        metrics |= _evaluated(job, training, run.model, reference)
    if not run.folder.is_local:
        # The copy on this host; Ray ends the processes of trials without their exit handlers.
        shutil.rmtree(run.folder.local)
    return metrics, run.model


@dataclass(frozen=True)
class BeforeTheEnd:
    """Passes on the reports of a training except the one of its last step.

    With that report, early stopping would end the trial before its model is saved.
    """

    on_report: Callable[[Mapping[str, float]], None]
    steps: int
    """Number of steps of the training."""

    def __call__(self, metrics: Mapping[str, float]) -> None:
        """Passes on the metrics of a checkpoint."""
        if metrics.get("step", 0) < self.steps:
            self.on_report(metrics)


def training_resources(job: TuneJob) -> TrialResources:
    """Returns the resources of a trial at the point of the space that needs the most."""
    scaling = {name: domain.ends for name, domain in job.space.parameters.items() if name.split(".")[0] == "scaling"}
    candidates = []
    for values in itertools.product(*scaling.values()):
        each = changed_training(job, dict(zip(scaling, values, strict=True))).scaling
        candidates.append(
            worker_resources(each.bounds[1], each.cpus_per_worker, each.gpus_per_worker, each.data_tasks_per_worker)
        )
    return TrialResources(
        **{name: max(getattr(each, name) for each in candidates) for name in TrialResources.__dataclass_fields__}
    )


def _costs(training: TrainJob, model: Path) -> dict[str, float]:
    """Returns the prefill costs of the trained model at each validation budget that it supports."""
    config, legal = config_of(model), connector_of(model).supported_budgets
    metrics: dict[str, float] = {}
    for budget in training.validation.budgets:
        if budget in legal:
            costs = prefill_costs(model, config.connector_config, budget, _CACHE_BYTES)
            metrics |= {f"{name}@{budget}": value for name, value in costs.items() if name != "tokens"}
    return metrics


def _evaluated(job: TuneJob, training: TrainJob, model: str, reference: Reference) -> dict[str, float]:
    """Evaluates the trained model where it was trained: in this process, or on the resources of one of its workers.

    The workers have ended by then, so their share of the cluster is free.
    """
    scaling = training.scaling
    trained = resolve_checkpoint(model)
    if scaling.bounds[1] == 0:
        return _measured(job, trained, reference)
    remote = ray.remote(num_cpus=scaling.cpus_per_worker, num_gpus=scaling.gpus_per_worker)(_measured)
    metrics: dict[str, float] = ray.get(remote.remote(job, trained, reference))
    return metrics


def _measured(job: TuneJob, model: ResolvedCheckpoint, reference: Reference) -> dict[str, float]:
    assert job.evaluation is not None
    changes = {"model": CheckpointModelConfig(reference=model.reference), "storage": job.storage}
    evaluation = job.evaluation.model_copy(update=changes)
    latency = any(objective.metric == "latency_ms" for objective in job.objectives)
    metrics = WarmEvaluator(evaluation, {model.reference: model}, reference, measure_latency=latency).metrics({})
    return {name: value for name, value in metrics.items() if name != "computed"}
