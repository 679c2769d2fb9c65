"""A search on Ray Tune: a planner's points as trials, each recorded as soon as it is finished."""

import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ray import tune
from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler
from ray.tune.search import Searcher

from parcelray.config.objectives import Objective
from parcelray.config.search_space import Assignment
from parcelray.errors import ParcelrayError, SystemFailure, UserError
from parcelray.tuning.planner import Planner
from parcelray.tuning.trial_record import FinishedTrial, TrialRecord, point_key
from parcelray.tuning.trial_resources import TrialResources, Watchdog

SCALAR = "objective"
"""In a trial's result: the first objective, more being better; what early stopping compares."""
STEPS = "steps"
"""In a trial's result: steps of the training so far."""
METRICS = "metrics"
"""In a trial's result: what it measured, by name."""
FINISHED = "finished"
"""In a trial's result: whether it is the last one."""
ASSIGNMENT = "trained_assignment"
"""In a result of a member of a population: the values that it was trained with last."""


_NO_REASON = "it failed without a word"


class SearchObserver(Protocol):
    """Is told what happens to the trials, in the driver."""

    def started(self, key: str, assignment: Assignment) -> None:
        """A trial runs."""

    def reported(self, key: str, metrics: Mapping[str, float], steps: int) -> None:
        """A training has got to a step."""

    def finished(self, trial: FinishedTrial) -> None:
        """A trial has ended, well or not, and is recorded."""


def objective_value(objective: Objective, metrics: Mapping[str, float]) -> float:
    """An objective, more being better.

    Raises:
        UserError: it was not measured.
    """
    if objective.metric not in metrics:
        raise UserError(
            f"The objective {objective.metric} was not measured; measured: {', '.join(sorted(metrics))}. Name one of"
            " them."
        )
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
        stall_s: longest time in which trials wait, none runs, or none of those that run has its workers.

    Raises:
        SystemFailure: nothing has computed for so long.
        KeyboardInterrupt: the search was interrupted; what is finished is recorded.
    """
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    # The observer tells what happens; Tune's tables of every trial would hide it.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    # Tune's own state is never read again; writing it after every trial would take longer than the trials.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "600")
    keeper = _Keeper(planner, record, observer, Watchdog(resources, stall_s))
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
            # A member of a population gets a process of its own, like every training, so that none inherits what
            # another left on a GPU.
            warnings.filterwarnings("ignore", "Consider boosting PBT performance", UserWarning)
            tuner.fit()
    except Exception:
        # What a callback raises reaches us wrapped in Tune's words.
        if keeper.failure is not None:
            raise keeper.failure from None
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
        """The planner is told by the keeper, which records first."""

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune writes itself to disk at its start, and is never read from there."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """The record is all that is kept."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing was saved."""


class _Keeper(Callback):
    """Records trials as they finish, tells the planner and the observer, and has it watched that something runs."""

    def __init__(self, planner: Planner, record: TrialRecord, observer: SearchObserver, watchdog: Watchdog) -> None:
        self._planner = planner
        self._record = record
        self._observer = observer
        self._watchdog = watchdog
        self._running: dict[str, tuple[Assignment, float]] = {}
        self._last: dict[str, Mapping[str, Any]] = {}
        self.failure: ParcelrayError | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Nothing, see `_PlannedPoints`."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._watchdog.feed()
        if trial.trial_id in self._running:
            return  # goes on after a pause
        assignment = trial.config["assignment"]
        self._running[trial.trial_id] = (assignment, time.monotonic())
        self._observer.started(point_key(assignment), assignment)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        self._watchdog.feed()
        if METRICS in result:
            self._last[trial.trial_id] = result
            if not result.get(FINISHED):
                started, _ = self._running[trial.trial_id]
                self._observer.reported(point_key(started), result[METRICS], int(result.get(STEPS, 0)))

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
            self._watchdog.look(statuses.count(Trial.RUNNING), statuses.count(Trial.PENDING))
        except SystemFailure as error:
            self.failure = error
            raise

    def _finish(self, trial: Trial, last: Mapping[str, Any], error: str | None, *, stopped: bool) -> None:
        self._watchdog.feed()
        point, began = self._running.pop(trial.trial_id)
        # A member of a population keeps the key of the point that it started from, and ends with the values that it was
        # trained with last.
        assignment, metrics = last.get(ASSIGNMENT, trial.config["assignment"]), last.get(METRICS, {})
        finished = FinishedTrial(
            point_key(point), assignment, dict(metrics), time.monotonic() - began, error, stopped and error is None
        )
        self._record.add(finished)
        self._planner.tell(finished)
        self._observer.finished(finished)


def _reason(trial: Trial) -> str:
    """The last line of what a trial failed with, from the file that Tune has just written; its other record of it is a pickle."""
    if trial.error_file is None:
        return _NO_REASON
    return last_line(Path(trial.error_file).read_text(encoding="utf-8", errors="replace")) or _NO_REASON


def last_line(text: str) -> str:
    """What a trial failed with: the last line of a traceback that is not empty; "" without any."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("parcelray.errors.") if lines else ""


def evaluation_trial(measure: Callable[[Assignment], Mapping[str, float]], objective: Objective) -> Any:
    """A trial that measures a point at once, in an actor that keeps what the measuring object holds for the next one.

    Args:
        measure: of an object that each actor gets a copy of.
        objective: the first.
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
