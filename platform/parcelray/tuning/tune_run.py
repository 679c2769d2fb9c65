"""A search on Ray Tune: runs the points of a planner as trials, and records each trial as soon as it is finished."""

import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray import tune
from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler
from ray.tune.search import Searcher

from parcelray.config.objectives import Objective
from parcelray.config.search_space import Assignment
from parcelray.errors import ParcelrayError, SystemFailure, UserError
from parcelray.files import is_local, open_storage
from parcelray.tuning.planner import Planner
from parcelray.tuning.trial_record import FinishedTrial, TrialRecord, point_key
from parcelray.tuning.trial_resources import TrialResources, Watchdog

SCALAR = "objective"
"""Key in the result of a trial: the first objective, larger is better; early stopping compares it."""
STEPS = "steps"
"""Key in the result of a trial: steps trained so far."""
METRICS = "metrics"
"""Key in the result of a trial: the measured metrics by name."""
FINISHED = "finished"
"""Key in the result of a trial: whether it is the last result."""
ASSIGNMENT = "trained_assignment"
"""Key in the result of a population member: the values that it was last trained with."""


_UNKNOWN_ERROR = "it failed without an error message"


class SearchObserver(Protocol):
    """Receives the events of the trials, in the driver's process."""

    def started(self, key: str, assignment: Assignment) -> None:
        """Called when a trial starts."""

    def reported(self, key: str, metrics: Mapping[str, float], steps: int) -> None:
        """Called when a training reports the metrics of a step."""

    def finished(self, trial: FinishedTrial) -> None:
        """Called when a trial has succeeded or failed, after it has been recorded."""


def objective_value(objective: Objective, metrics: Mapping[str, float]) -> float:
    """Returns the value of an objective with its sign changed where needed, so that larger is better.

    Raises:
        UserError: the metric was not measured.
    """
    if objective.metric not in metrics:
        raise UserError(
            f"The objective {objective.metric} was not measured; name one of the measured metrics:"
            f" {', '.join(sorted(metrics))}."
        )
    value = metrics[objective.metric]
    return value if objective.mode == "max" else -value


def run_search(  # noqa: PLR0913 - the parts of a search
    trainable: Any,
    planner: Planner,
    record: TrialRecord,
    observers: Sequence[SearchObserver],
    *,
    folder: str | Path,
    resources: TrialResources,
    max_concurrent: int,
    scheduler: TrialScheduler | None = None,
    reuse_actors: bool = False,
    stall_s: float = 300.0,
) -> None:
    """Runs the points of a planner on the connected Ray instance until there are no more.

    Args:
        trainable: Tune trainable whose config has `assignment`, and whose results have `METRICS` and `FINISHED`.
        planner: proposes the points.
        record: stores each finished trial before the observers are called.
        observers: receive the events of the trials.
        folder: folder or URI for Tune's own state. No later session reads it, but the members of a population exchange
            their checkpoints there.
        resources: resources of a trial.
        max_concurrent: number of trials that run at the same time.
        scheduler: early stopping; None: every trial runs to its end.
        reuse_actors: whether a trial may run in the process of a finished one and reuse the objects that it holds.
        stall_s: longest time in which nothing computes, seconds.

    Raises:
        SystemFailure: nothing has computed for `stall_s` seconds.
        KeyboardInterrupt: the search was interrupted; finished trials are recorded.
    """
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    # The observers print the progress; Tune's tables of all trials would hide it.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    # Tune's own state is never read again; writing it after every trial would take longer than the trials.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "600")
    filesystem, path = open_storage(str(folder))
    recorder = TrialRecorder(planner, record, observers, Watchdog(resources, stall_s))
    # A population uses no search algorithm, because all its members are known before any of them starts.
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
            storage_path=path,
            storage_filesystem=None if is_local(filesystem) else PyFileSystem(FSSpecHandler(filesystem)),
            callbacks=[recorder],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )
    try:
        with warnings.catch_warnings():
            # A population member runs in a new process, like every training, so that it inherits no GPU memory of
            # another one.
            warnings.filterwarnings("ignore", "Consider boosting PBT performance", UserWarning)
            tuner.fit()
    except Exception:
        # Tune wraps the errors of its callbacks; raise the original one.
        if recorder.failure is not None:
            raise recorder.failure from None
        raise
    if not planner.is_done:
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
        """Does nothing: `TrialRecorder` records a trial first, and then passes it to the planner."""

    def __getstate__(self) -> dict[str, Any]:
        """Returns an empty state: Tune pickles this object at its start, and the pickle is never read again."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Does nothing: all that is needed is in the record."""

    def restore(self, checkpoint_path: str) -> None:
        """Does nothing, see `save`."""


class TrialRecorder(Callback):
    """Records each trial as it finishes, passes it to the planner and the observers, and runs the watchdog."""

    def __init__(
        self, planner: Planner, record: TrialRecord, observers: Sequence[SearchObserver], watchdog: Watchdog
    ) -> None:
        self._planner = planner
        self._record = record
        self._observers = observers
        self._watchdog = watchdog
        self._running: dict[str, tuple[Assignment, float]] = {}
        self._last: dict[str, Mapping[str, Any]] = {}
        self.failure: ParcelrayError | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Returns an empty state, see `_PlannedPoints`."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._watchdog.reset()
        if trial.trial_id in self._running:
            return  # The trial continues after a pause.
        assignment = trial.config["assignment"]
        self._running[trial.trial_id] = (assignment, time.monotonic())
        for observer in self._observers:
            observer.started(point_key(assignment), assignment)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        self._watchdog.reset()
        if METRICS in result:
            self._last[trial.trial_id] = result
            if not result.get(FINISHED):
                started, _ = self._running[trial.trial_id]
                for observer in self._observers:
                    observer.reported(point_key(started), result[METRICS], int(result.get(STEPS, 0)))

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        last = self._last.pop(trial.trial_id, {})
        self._finish(
            trial, last, None if METRICS in last else "it ended without a result", stopped=not last.get(FINISHED, False)
        )

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._last.pop(trial.trial_id, None)
        self._finish(trial, {}, _reason(trial), stopped=False)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        statuses = [trial.status for trial in trials]
        try:
            self._watchdog.check(statuses.count(Trial.RUNNING), statuses.count(Trial.PENDING))
        except SystemFailure as error:
            self.failure = error
            raise

    def _finish(self, trial: Trial, last: Mapping[str, Any], error: str | None, *, stopped: bool) -> None:
        self._watchdog.reset()
        point, began = self._running.pop(trial.trial_id)
        # A population member keeps the key of its first point. Its assignment holds the values of its last training.
        assignment, metrics = last.get(ASSIGNMENT, trial.config["assignment"]), last.get(METRICS, {})
        finished = FinishedTrial(
            point_key(point), assignment, dict(metrics), time.monotonic() - began, error, stopped and error is None
        )
        self._record.add(finished)
        self._planner.tell(finished)
        for observer in self._observers:
            observer.finished(finished)


def _reason(trial: Trial) -> str:
    """Returns the last line of a trial's error from the text file that Tune writes; its other copy is a pickle."""
    if trial.error_file is None:
        return _UNKNOWN_ERROR
    return last_line(Path(trial.error_file).read_text(encoding="utf-8", errors="replace")) or _UNKNOWN_ERROR


def last_line(text: str) -> str:
    """Returns the last line of a traceback that is not empty, without our package's name; "" if there is none."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("parcelray.errors.") if lines else ""


def evaluation_trial(measure: Callable[[Assignment], Mapping[str, float]], objective: Objective) -> Any:
    """Returns a Tune trainable that measures a point in a single step.

    Its actor keeps the objects that `measure` holds, such as the model, for the next trial.

    Args:
        measure: measures a point; usually a method of an object of which each actor gets a copy.
        objective: the first objective of the search.
    """
    return tune.with_parameters(_EvaluationTrial, measure=measure, objective=objective)


class _EvaluationTrial(tune.Trainable):
    def setup(self, config: dict[str, Any], measure: Any, objective: Objective) -> None:  # type: ignore[override]
        self._measure = measure
        self._objective = objective

    def step(self) -> dict[str, Any]:
        metrics = dict(self._measure(self.config["assignment"]))
        return {
            METRICS: metrics,
            SCALAR: objective_value(self._objective, metrics),
            STEPS: 1,
            FINISHED: True,
            "done": True,
        }

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        return True
