"""Trials that train: a driver that takes no CPU of its own builds the training's run, whose workers take theirs from the cluster."""

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
from parcelray.config.search_space import Assignment, SearchSpace
from parcelray.config.tune import AshaScheduler, EarlyStopping, PbtAlgorithm
from parcelray.config.tune import HyperBandScheduler as HyperBandConfig
from parcelray.tuning.exploration import explore
from parcelray.tuning.remembering_scheduler import RememberingScheduler, ReportHistory
from parcelray.tuning.trial_resources import TrialResources
from parcelray.tuning.tune_run import ASSIGNMENT, FINISHED, METRICS, SCALAR, STEPS, objective_value

DRIVER_CPUS = 0.01
"""Of the trial's own process; with a whole CPU the drivers of all trials take those that their workers wait for, and 0 is refused."""
_STATE = "state.json"
_SEGMENT = "segment"
"""In a member's result: segments of the population so far."""

Report = Callable[[Mapping[str, float]], None]
"""Is told a training's metrics at each of its checkpoints."""


@dataclass(frozen=True)
class Segment:
    """A part of a training, with data and budget draws of its own."""

    place: int = 0
    """From 0 on."""
    count: int = 1
    """How many there are; the job's steps are divided among them."""
    model: str | None = None
    """Checkpoint to start from instead of the job's."""

    def steps(self, total: int) -> tuple[int, int]:
        """Of the job's steps, how many are trained before this part, and how many at its end."""
        return total * self.place // self.count, total * (self.place + 1) // self.count


WHOLE = Segment()


class TrainPoint(Protocol):
    """Trains one point; given by the layer that knows jobs."""

    def __call__(
        self, assignment: Assignment, on_report: Report, *, segment: Segment = WHOLE
    ) -> tuple[dict[str, float], str]:
        """Trains a point to its end.

        Args:
            assignment: what it changes in the job.
            on_report: called at each checkpoint but the last.
            segment: the part of the training.

        Returns:
            The last metrics, `step` among them (steps of the segments before it included), and the folder of the model.
        """


def training_trial(train: TrainPoint, objective: Objective) -> Any:
    """A trial that trains a point and reports at each checkpoint of the training."""
    return tune.with_parameters(_train, train=train, objective=objective)


def population_trial(train: TrainPoint, objective: Objective, algorithm: PbtAlgorithm) -> Any:
    """A member of a population: trains in segments, after each of which it may have to go on from another's model with other values."""
    return tune.with_parameters(_train_segments, train=train, objective=objective, segments=algorithm.segments)


def early_stopping(config: EarlyStopping | None, total_steps: int, folder: Path) -> TrialScheduler | None:
    """Tune's scheduler; None: every training runs to its end.

    Args:
        config: of the search.
        total_steps: of the longest training.
        folder: of the search, where what trainings report is kept for one that goes on.
    """
    if config is None:
        return None
    common: dict[str, Any] = {"metric": SCALAR, "mode": "max", "time_attr": STEPS}
    if isinstance(config, HyperBandConfig):
        # Its brackets are made of trials that live and wait for each other, so none can be made again of finished ones.
        return HyperBandScheduler(**common, max_t=total_steps, reduction_factor=config.reduction)
    scheduler: TrialScheduler
    if isinstance(config, AshaScheduler):
        grace = min(config.grace_steps, total_steps)
        scheduler = ASHAScheduler(**common, max_t=total_steps, grace_period=grace, reduction_factor=config.reduction)
    else:
        scheduler = MedianStoppingRule(
            **common, grace_period=config.grace_steps, min_samples_required=config.min_trials
        )
    return RememberingScheduler(scheduler, ReportHistory(folder))


def population_scheduler(space: SearchSpace, algorithm: PbtAlgorithm, seed: int) -> TrialScheduler:
    """Tune's population-based training over the points of a space; all members finish a segment before any is compared.

    Tune's own mutations know neither conditions nor constraints, and multiply a choice.
    """
    return PopulationBasedTraining(
        time_attr=_SEGMENT,
        metric=SCALAR,
        mode="max",
        perturbation_interval=1,
        custom_explore_fn=functools.partial(_explored, space=space, rng=random.Random(seed)),
        quantile_fraction=algorithm.quantile,
        synch=True,
        log_config=False,
    )


def worker_resources(
    num_workers: int, cpus_per_worker: float, gpus_per_worker: float, data_tasks: int
) -> TrialResources:
    """What a training trial takes: its workers' shares and a CPU for each task that prepares their data; in-process, a CPU."""
    if num_workers == 0:
        return TrialResources(cpus=1.0, gpus=gpus_per_worker)
    return TrialResources(
        DRIVER_CPUS,
        workers=num_workers,
        worker_cpus=cpus_per_worker,
        worker_gpus=gpus_per_worker,
        helper_cpus=num_workers * data_tasks,
    )


def _train(config: dict[str, Any], train: TrainPoint, objective: Objective) -> None:
    metrics, _ = train(config["assignment"], _Reporter(objective))
    tune.report(_result(metrics, objective, int(metrics.get("step", 0)), finished=True))


def _explored(config: dict[str, Any], space: SearchSpace, rng: random.Random) -> dict[str, Any]:
    return config | {"assignment": explore(space, config["assignment"], rng)}


def _train_segments(config: dict[str, Any], train: TrainPoint, objective: Objective, segments: int) -> None:
    state = _restored()
    for place in range(state["segment"], segments):
        metrics, model = train(
            config["assignment"], lambda metrics: None, segment=Segment(place, segments, state["model"])
        )
        state = {"segment": place + 1, "model": model}
        with tempfile.TemporaryDirectory(prefix="parcelray-population-") as name:
            (Path(name) / _STATE).write_text(json.dumps(state), encoding="utf-8")
            result = _result(metrics, objective, int(metrics["step"]), finished=place + 1 == segments)
            # Tune mutates the values of the worse once more after the last segment, with which nothing is trained.
            result |= {_SEGMENT: place + 1, ASSIGNMENT: config["assignment"]}
            tune.report(result, checkpoint=Checkpoint.from_directory(name))


def _restored() -> dict[str, Any]:
    """Where a member goes on: its own last segment, or that of the one it copies."""
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return {"segment": 0, "model": None}
    with checkpoint.as_directory() as name:
        state: dict[str, Any] = json.loads((Path(name) / _STATE).read_text(encoding="utf-8"))
        return state


class _Reporter:
    """Sends a training's reports to Tune, from this process or from that of Ray Train's controller."""

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
            # Ray's callback uses neither the run's context nor a checkpoint; called here, it puts the report into the
            # trial's queue.
            self._queue.after_report(None, [result], None)  # type: ignore[arg-type]


def _result(metrics: Mapping[str, float], objective: Objective, steps: int, *, finished: bool) -> dict[str, Any]:
    return {METRICS: dict(metrics), SCALAR: objective_value(objective, metrics), STEPS: steps, FINISHED: finished}
