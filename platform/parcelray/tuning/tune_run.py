"""A search on Ray Tune: a planner's points as trials, each recorded as soon as it is finished."""

import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler
from ray.tune.search import Searcher

from parcelray.config.search_space import Assignment
from parcelray.config.tune import Objective
from parcelray.errors import ParcelrayError, SystemFailure, UserError
from parcelray.tuning.planner import Planner
from parcelray.tuning.trial_record import FinishedTrial, TrialRecord, point_key

SCALAR = "objective"
"""In a trial's result: the first objective, more being better; what early stopping compares."""
STEPS = "steps"
"""In a trial's result: steps of the training so far."""
METRICS = "metrics"
"""In a trial's result: what it measured, by name."""
FINISHED = "finished"
"""In a trial's result: whether it is the last one."""


class SearchObserver(Protocol):
    """Is told what happens to the trials, in the driver."""

    def started(self, key: str, assignment: Assignment) -> None:
        """A trial runs."""

    def reported(self, key: str, metrics: Mapping[str, float], steps: int) -> None:
        """A training has got to a step."""

    def finished(self, trial: FinishedTrial) -> None:
        """A trial has ended, well or not, and is recorded."""


@dataclass(frozen=True)
class TrialResources:
    """What a trial takes of the cluster: the actor itself, and the workers that it starts."""

    cpus: float
    gpus: float = 0.0
    worker_cpus: float = 0.0
    """CPUs of the processes that the trial starts by itself; Tune does not reserve them."""
    worker_gpus: float = 0.0

    def concurrency(self, total: Mapping[str, float], wanted: int | None) -> int:
        """How many trials the cluster holds at the same time. With more, trials that start workers would wait for each other for ever (ray#54305).

        Args:
            total: resources of the whole cluster.
            wanted: at most so many; None: as many as it holds.

        Raises:
            UserError: it cannot hold one.
        """
        needs = {"CPU": self.cpus + self.worker_cpus, "GPU": self.gpus + self.worker_gpus}
        # A small share more than the sum of the shares must not count as one less.
        holds = min(int(total.get(name, 0.0) / need + 1e-9) for name, need in needs.items() if need > 0)
        if holds < 1:
            asked = " and ".join(f"{need:g} {name}" for name, need in needs.items() if need > 0)
            there = " and ".join(f"{total.get(name, 0.0):g} {name}" for name, need in needs.items() if need > 0)
            raise UserError(f"A trial needs {asked}, but the Ray cluster has {there} in all; give the trials fewer workers, or use a larger cluster.")
        return holds if wanted is None else min(holds, wanted)


def objective_value(objective: Objective, metrics: Mapping[str, float]) -> float:
    """An objective, more being better.

    Raises:
        UserError: it was not measured.
    """
    if objective.metric not in metrics:
        raise UserError(f"The objective {objective.metric} was not measured; measured: {', '.join(sorted(metrics))}. Name one of them.")
    value = metrics[objective.metric]
    return value if objective.mode == "max" else -value


def run_search(  # noqa: PLR0913 - the parts of a search
    trainable: Any,
    planner: Planner,
    record: TrialRecord,
    observer: SearchObserver,
    *,
    folder: Path,
    resources: TrialResources,
    max_concurrent: int,
    scheduler: TrialScheduler | None = None,
    reuse_actors: bool = False,
    stall_s: float = 300.0,
) -> None:
    """Runs the points that the planner hands out until it has no more, on the Ray instance that this process is connected to.

    Args:
        trainable: of Tune; its config has `assignment`, its results `METRICS` and, at the end, `FINISHED`.
        planner: of the points.
        record: takes the finished trials, before anyone is told.
        observer: of the trials.
        folder: for what Tune itself keeps; nothing in it is read again.
        resources: of a trial.
        max_concurrent: trials at the same time.
        scheduler: early stopping; None: every trial runs to its end.
        reuse_actors: whether a trial may take over the process of one that is finished, with all that it holds.
        stall_s: longest time in which trials wait and none runs.

    Raises:
        SystemFailure: trials wait, and none runs.
        KeyboardInterrupt: the search was interrupted; what is finished is recorded.
    """
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    # The observer tells what happens; Tune's tables of every trial would hide it.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    # Tune's own state is never read again; writing it after every trial would take longer than the trials.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "600")
    keeper = _Keeper(planner, record, observer, stall_s)
    # A population takes no search algorithm: all its members are known before any starts.
    is_population = isinstance(scheduler, PopulationBasedTraining)
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})),
        param_space={"assignment": tune.grid_search(list(iter(planner.ask, None)))} if is_population else {},
        tune_config=tune.TuneConfig(
            search_alg=None if is_population else _PlannedPoints(planner),
            scheduler=scheduler,
            num_samples=1 if is_population else planner.num_points,
            max_concurrent_trials=max_concurrent,
            reuse_actors=reuse_actors,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder.resolve()),
            callbacks=[keeper],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )
    try:
        with warnings.catch_warnings():
            # A member of a population gets a process of its own, like every training, so that none inherits what another left on a GPU.
            warnings.filterwarnings("ignore", "Consider boosting PBT performance", UserWarning)
            tuner.fit()
    except Exception:
        # What a callback raises reaches us wrapped in Tune's words.
        if keeper.failure is not None:
            raise keeper.failure from None
        raise
    if not planner.is_finished or keeper.num_running:
        raise KeyboardInterrupt


class _PlannedPoints(Searcher):
    """The planner as Tune's search algorithm."""

    def __init__(self, planner: Planner) -> None:
        super().__init__(metric=SCALAR, mode="max")
        self._planner = planner

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        point = self._planner.ask()
        if point is not None:
            return {"assignment": point}
        return Searcher.FINISHED if self._planner.is_finished else None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The planner is told by the keeper, which records first."""

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune writes itself to disk at its start, and is never read from there."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """The record is all that is kept."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing was saved."""


class _Keeper(Callback):
    """Records trials as they finish, tells the planner and the observer, and watches that something runs."""

    def __init__(self, planner: Planner, record: TrialRecord, observer: SearchObserver, stall_s: float) -> None:
        self._planner = planner
        self._record = record
        self._observer = observer
        self._stall_s = stall_s
        self._running: dict[str, tuple[Assignment, float]] = {}
        self._last: dict[str, Mapping[str, Any]] = {}
        self._busy_at = time.monotonic()
        self.failure: ParcelrayError | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Nothing, see `_PlannedPoints`."""
        return {}

    @property
    def num_running(self) -> int:
        """Trials that were started and have not ended."""
        return len(self._running)

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        if trial.trial_id in self._running:
            return  # goes on after a pause
        assignment = trial.config["assignment"]
        self._running[trial.trial_id] = (assignment, time.monotonic())
        self._observer.started(point_key(assignment), assignment)

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any) -> None:
        if METRICS in result:
            self._last[trial.trial_id] = result
            if not result.get(FINISHED):
                started, _ = self._running[trial.trial_id]
                self._observer.reported(point_key(started), result[METRICS], int(result.get(STEPS, 0)))

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        last = self._last.pop(trial.trial_id, {})
        self._finish(trial, last.get(METRICS, {}), None if METRICS in last else "it ended without a result", stopped=not last.get(FINISHED, False))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._last.pop(trial.trial_id, None)
        self._finish(trial, {}, _reason(trial), stopped=False)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        statuses = [trial.status for trial in trials]
        if Trial.RUNNING in statuses or Trial.PENDING not in statuses:
            self._busy_at = time.monotonic()
        elif time.monotonic() - self._busy_at > self._stall_s:
            waiting = [trial for trial in trials if trial.status == Trial.PENDING]
            asked = _counts(getattr(waiting[0].placement_group_factory, "required_resources", {}))
            total, free = ray.cluster_resources(), ray.available_resources()  # type: ignore[no-untyped-call]
            self.failure = SystemFailure(
                f"{len(waiting)} trials have waited for {self._stall_s:g} s and none runs: each asks for {asked}, and of the cluster's {_counts(total)} "
                f"are free {_counts(free)}. End what else runs there, or raise stall_s; the same command with --resume goes on."
            )
            raise self.failure

    def _finish(self, trial: Trial, metrics: Mapping[str, float], error: str | None, *, stopped: bool) -> None:
        point, began = self._running.pop(trial.trial_id)
        # A member of a population keeps the key of the point that it started from, and ends with the values that it was given last.
        assignment = trial.config["assignment"]
        finished = FinishedTrial(point_key(point), assignment, dict(metrics), time.monotonic() - began, error, stopped and error is None)
        self._record.add(finished)
        self._planner.tell(finished)
        self._observer.finished(finished)


def _reason(trial: Trial) -> str:
    """The last line of what a trial failed with, from the file that Tune has just written; its other record of it is a pickle."""
    if trial.error_file is None:
        return "it failed without a word"
    lines = [line.strip() for line in Path(trial.error_file).read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("parcelray.errors.")


def _counts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0.0):g} {name}" for name in ("CPU", "GPU") if name == "CPU" or name in resources)


def evaluation_trial(evaluator: Callable[[], Callable[[Assignment], Mapping[str, float]]], objective: Objective) -> Any:
    """A trial that measures a point at once, in an actor that keeps what the evaluator holds for the next one.

    Args:
        evaluator: makes the measuring function, once an actor.
        objective: the first.
    """
    return tune.with_parameters(_EvaluationTrial, evaluator=evaluator, objective=objective)


class _EvaluationTrial(tune.Trainable):
    def setup(self, config: dict[str, Any], evaluator: Any, objective: Objective) -> None:  # type: ignore[override]
        self._measure = evaluator()
        self._objective = objective

    def step(self) -> dict[str, Any]:
        metrics = dict(self._measure(self.config["assignment"]))
        return {METRICS: metrics, SCALAR: objective_value(self._objective, metrics), STEPS: 1, FINISHED: True, "done": True}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        return True
