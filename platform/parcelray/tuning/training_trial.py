"""Tune trials that train: one whole training per trial, or the members of a population, which train in segments.

The process of a trial is only a driver and reserves almost no CPU; the workers of its training reserve theirs from the
cluster. This module does not depend on jobs: the function that trains a point is passed in (see `TrainPoint`).
"""

import functools
import json
import os
import random
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ray import tune
from ray.tune import Checkpoint
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import (
    ASHAScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from parcelray.config.objectives import Objective
from parcelray.config.search_space import Assignment, ChoiceDomain, Domain, IntegerDomain, SearchSpace
from parcelray.config.tune import AshaScheduler, EarlyStopping, PbtAlgorithm
from parcelray.config.tune import HyperBandScheduler as HyperBandConfig
from parcelray.tuning.resumable_scheduler import ReportHistory, ResumableScheduler
from parcelray.tuning.trial_resources import TrialResources
from parcelray.tuning.tune_run import ASSIGNMENT, FINISHED, METRICS, SCALAR, STEPS, objective_value

DRIVER_CPUS = 0.01
"""CPUs of a trial's own process.

With a whole CPU, the drivers of all trials would take the CPUs that their workers wait for; Tune refuses 0.
"""
RESAMPLE = 0.25
"""Probability that `explore` draws a parameter at random instead of changing it a little.

The value is that of Jaderberg et al., 2017, and of Ray Tune.
"""
FACTORS = (0.8, 1.2)
"""Factors that `explore` scales numbers by."""
_EXPLORE_ATTEMPTS = 200
_STATE = "state.json"
_SEGMENT = "segment"
"""Key in the result of a population member: number of segments trained so far."""

OnReport = Callable[[Mapping[str, float]], None]
"""Called with the metrics of a training at each of its checkpoints."""


@dataclass(frozen=True)
class Segment:
    """A part of a training, with its own data and budget draws."""

    index: int = 0
    """Index among the segments, from 0."""
    count: int = 1
    """Number of segments; the job's steps are divided among them."""
    model: str | None = None
    """Checkpoint to start from; None: the job's model."""

    def steps(self, total: int) -> tuple[int, int]:
        """Returns how many of `total` steps are trained before this segment, and how many at its end."""
        return total * self.index // self.count, total * (self.index + 1) // self.count


WHOLE = Segment()


class TrainPoint(Protocol):
    """A function that trains one point of the space."""

    def __call__(
        self, assignment: Assignment, on_report: OnReport, *, segment: Segment = WHOLE
    ) -> tuple[dict[str, float], str]:
        """Trains a point to its end.

        Args:
            assignment: values that the point sets in the job.
            on_report: called at each checkpoint except the last.
            segment: the part of the training to run.

        Returns:
            The last metrics, including `step` (with the steps of earlier segments), and the folder or URI of the model.
        """


def training_trial(train: TrainPoint, objective: Objective) -> Any:
    """Returns a Tune trainable that trains a point and reports at each checkpoint of the training."""
    return tune.with_parameters(_train, train=train, objective=objective)


def population_trial(train: TrainPoint, objective: Objective, algorithm: PbtAlgorithm) -> Any:
    """Returns a Tune trainable for a population member, which trains in segments.

    After each segment the member may have to continue from the model of another member, with other values.
    """
    return tune.with_parameters(_train_segments, train=train, objective=objective, segments=algorithm.segments)


def early_stopping(config: EarlyStopping | None, total_steps: int, folder: str | Path) -> TrialScheduler | None:
    """Returns Tune's scheduler for early stopping; None: every training runs to its end.

    Args:
        config: early stopping of the search.
        total_steps: steps of the longest training.
        folder: run folder of the search, or its URI; the reports of the trainings are stored there for a resume.
    """
    if config is None:
        return None
    common: dict[str, Any] = {"metric": SCALAR, "mode": "max", "time_attr": STEPS}
    if isinstance(config, HyperBandConfig):
        # Its brackets consist of live trials that wait for each other, so finished trials cannot rebuild a bracket.
        return HyperBandScheduler(**common, max_t=total_steps, reduction_factor=config.reduction)
    scheduler: TrialScheduler
    if isinstance(config, AshaScheduler):
        grace = min(config.grace_steps, total_steps)
        scheduler = ASHAScheduler(**common, max_t=total_steps, grace_period=grace, reduction_factor=config.reduction)
    else:
        scheduler = MedianStoppingRule(
            **common, grace_period=config.grace_steps, min_samples_required=config.min_trials
        )
    return ResumableScheduler(scheduler, ReportHistory(folder))


def population_scheduler(space: SearchSpace, algorithm: PbtAlgorithm, seed: int) -> TrialScheduler:
    """Returns Tune's population-based training over a space; members are compared once all finished a segment.

    The points are changed by `explore`, because Tune's own mutations ignore conditions and constraints, and would
    multiply a choice by a factor.
    """
    return PopulationBasedTraining(
        time_attr=_SEGMENT,
        metric=SCALAR,
        mode="max",
        perturbation_interval=1,
        custom_explore_fn=functools.partial(_explore_config, space=space, rng=random.Random(seed)),
        quantile_fraction=algorithm.quantile,
        synch=True,
        log_config=False,
    )


def worker_resources(
    num_workers: int, cpus_per_worker: float, gpus_per_worker: float, data_tasks: int
) -> TrialResources:
    """Returns the resources of a training trial.

    These are the shares of its workers and a CPU for each task that prepares their data; without workers, the training
    runs in the trial's process and takes one CPU.
    """
    if num_workers == 0:
        return TrialResources(cpus=1.0, gpus=gpus_per_worker)
    return TrialResources(
        DRIVER_CPUS,
        workers=num_workers,
        worker_cpus=cpus_per_worker,
        worker_gpus=gpus_per_worker,
        helper_cpus=num_workers * data_tasks,
    )


def explore(space: SearchSpace, assignment: Assignment, rng: random.Random) -> Assignment:
    """Returns a legal point near another: choices move to a neighbour in their list, numbers are scaled within range.

    A population member continues with such a point after it has copied the model of a better member. A parameter that
    the new values activate is drawn at random. If no attempt satisfies the constraints, the point is unchanged.

    Args:
        space: the search space.
        assignment: the point to start from.
        rng: source of the draws.
    """
    for _ in range(_EXPLORE_ATTEMPTS):
        moved = {
            name: (
                _move(domain, assignment[name], rng)
                if name in assignment and rng.random() >= RESAMPLE
                else domain.draw(rng)
            )
            for name, domain in space.parameters.items()
        }
        point = space.active(moved)
        if space.allows(point):
            return point
    return dict(assignment)


def _move(domain: Domain, value: Any, rng: random.Random) -> Any:
    if isinstance(domain, ChoiceDomain):
        index = domain.values.index(value) + rng.choice((-1, 1))
        return domain.values[min(max(index, 0), len(domain.values) - 1)]
    factor = rng.choice(FACTORS)
    if isinstance(domain, IntegerDomain):
        # Move by at least one step, or small numbers would never change.
        steps = max(1, round(abs(value * factor - value) / domain.step))
        moved = value + (steps if factor > 1 else -steps) * domain.step
        return min(max(moved, domain.low), domain.steps[-1])
    return min(max(value * factor, domain.low), domain.high)


def _explore_config(config: dict[str, Any], space: SearchSpace, rng: random.Random) -> dict[str, Any]:
    return config | {"assignment": explore(space, config["assignment"], rng)}


def _train(config: dict[str, Any], train: TrainPoint, objective: Objective) -> None:
    metrics, _ = train(config["assignment"], _Reporter(objective))
    tune.report(_result(metrics, objective, int(metrics.get("step", 0)), finished=True))


def _train_segments(config: dict[str, Any], train: TrainPoint, objective: Objective, segments: int) -> None:
    state = _restored_state()
    for index in range(state["segment"], segments):
        metrics, model = train(
            config["assignment"], lambda metrics: None, segment=Segment(index, segments, state["model"])
        )
        state = {"segment": index + 1, "model": model}
        with tempfile.TemporaryDirectory(prefix="parcelray-population-") as name:
            (Path(name) / _STATE).write_text(json.dumps(state), encoding="utf-8")
            result = _result(metrics, objective, int(metrics["step"]), finished=index + 1 == segments)
            # After the last segment Tune still changes the values of the worse members, but nothing is trained with
            # the new values. Hence the result names the values that were trained.
            result |= {_SEGMENT: index + 1, ASSIGNMENT: config["assignment"]}
            tune.report(result, checkpoint=Checkpoint.from_directory(name))


def _restored_state() -> dict[str, Any]:
    """Returns the state that a member continues from: its own last segment, or that of the member it copies."""
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return {"segment": 0, "model": None}
    with checkpoint.as_directory() as name:
        state: dict[str, Any] = json.loads((Path(name) / _STATE).read_text(encoding="utf-8"))
        return state


class _Reporter:
    """Sends the reports of a training to Tune, from this process or from the process of Ray Train's controller."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._process = os.getpid()
        self._queue = TuneReportCallback()  # type: ignore[no-untyped-call]

    def __call__(self, metrics: Mapping[str, float]) -> None:
        # The first checkpoints may come before the first validation.
        if self._objective.metric not in metrics:
            return
        result = _result(metrics, self._objective, int(metrics.get("step", 0)), finished=False)
        if os.getpid() == self._process:
            tune.report(result)
        else:
            # Ray's callback uses neither the run context nor a checkpoint; here it only puts the report into the
            # trial's queue.
            self._queue.after_report(None, [result], None)  # type: ignore[arg-type]


def _result(metrics: Mapping[str, float], objective: Objective, steps: int, *, finished: bool) -> dict[str, Any]:
    return {METRICS: dict(metrics), SCALAR: objective_value(objective, metrics), STEPS: steps, FINISHED: finished}
