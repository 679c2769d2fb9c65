"""Progress of a search: lines on the console, one MLflow run per trial, and the values that both show."""

import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import numpy as np
from rich.console import Console

from parcelray.config.objectives import Objective
from parcelray.config.search_space import Assignment
from parcelray.config.tune import TuneJob
from parcelray.errors import ParcelrayError, SystemFailure
from parcelray.tracking.mlflow_tracker import MlflowRunLogger, end_run, ended_children, flat_params, start_run
from parcelray.tuning.pareto import losses, volume_over_time
from parcelray.tuning.planner import Planner
from parcelray.tuning.trial_record import FinishedTrial, TrialRecord
from parcelray.tuning.tune_run import objective_value

OUTCOME_TAG = "parcel.outcome"
"""Tag of a trial's MLflow run: "finished", "stopped early" or "failed: ERROR"; a retry overwrites it."""
VOLUME = "search/hypervolume"
"""Metric of the search's MLflow run; its step is the number of finished trials."""
Bounds = Sequence[tuple[float, float]]
"""Smallest and largest value of each objective."""
_SCALES = {"score": (0.0, 100.0), "retention": (0.0, 100.0), "val": (0.0, 1.0)}
_MIN_SECONDS_BETWEEN_LINES = 5.0
"""Shortest time between two progress lines, seconds; it matters for short trials."""


class SearchProgress:
    """Prints a progress line as trials finish (see `SearchObserver`).

    The line has the numbers of finished, running and failed trials, the best trial, the hypervolume, and the time left.

    Args:
        job: the search.
        planner: provides the number of points.
        record: provides the finished trials.
        console: prints the lines.
        bounds: bounds of the objectives, see `bounds_of`; None: the hypervolume is not shown.
    """

    def __init__(
        self, job: TuneJob, planner: Planner, record: TrialRecord, console: Console, bounds: Bounds | None = None
    ) -> None:
        self._job = job
        self._planner = planner
        self._record = record
        self._console = console
        self._bounds = bounds
        self._running: set[str] = set()
        self._before = len(record.trials)
        self._began = time.monotonic()
        self._shown_at = 0.0

    def started(self, key: str, assignment: Assignment) -> None:
        """See `SearchObserver`."""
        self._running.add(key)

    def reported(self, key: str, metrics: Mapping[str, float], steps: int) -> None:
        """See `SearchObserver`."""
        values = ", ".join(
            f"{each.metric} {metrics[each.metric]:.4g}" for each in self._job.objectives if each.metric in metrics
        )
        self._console.print(f"trial {key} at step {steps}: {values or 'no objective yet'}")

    def finished(self, trial: FinishedTrial) -> None:
        """See `SearchObserver`."""
        self._running.discard(trial.key)
        if trial.error is not None:
            self._console.print(f"trial {trial.key} {describe(trial.assignment)} failed: {trial.error}", markup=False)
        is_last = len(self._record.trials) >= self._planner.num_points
        if is_last or time.monotonic() - self._shown_at >= _MIN_SECONDS_BETWEEN_LINES:
            self._shown_at = time.monotonic()
            self._console.print(self.line(), markup=False)

    def line(self) -> str:
        """Returns the state of the search in one line."""
        trials = self._record.trials
        succeeded = [trial for trial in trials if trial.error is None]
        parts = [
            f"{len(succeeded)} of {self._planner.num_points} trials done",
            f"{len(self._running)} running",
            f"{len(trials) - len(succeeded)} failed",
        ]
        best = best_of(self._job, trials)
        if best is not None:
            first = self._job.objectives[0]
            parts.append(f"best {first.metric} {best.metrics[first.metric]:.4g} at {describe(best.assignment)}")
        if len(self._job.objectives) > 1 and succeeded and self._bounds is not None:
            parts.append(f"hypervolume {volumes(self._job, trials, self._bounds)[-1]:.3f}")
        new = len(trials) - self._before
        if new > 0 and len(trials) < self._planner.num_points:
            left = (time.monotonic() - self._began) / new * (self._planner.num_points - len(trials))
            parts.append(f"about {left / 60:.0f} min left" if left > 90 else f"about {left:.0f} s left")
        return f"{self._job.name}: {', '.join(parts)}"


class TrialRuns:
    """Writes one MLflow run per trial, nested under the run of the search (see `SearchObserver`).

    A separate thread writes the runs, because the tracking store is slower than a warm trial. Trials that an earlier
    driver recorded, but did not write to MLflow before it was killed, are written at the start.

    Args:
        job: the search.
        uri: URI of the tracking store.
        parent_run_id: MLflow run of the search.
        recorded: trials that are in the record already.
        bounds: bounds of the objectives, see `bounds_of`; None: the hypervolume is not logged.
    """

    def __init__(
        self,
        job: TuneJob,
        uri: str,
        parent_run_id: str,
        recorded: Sequence[FinishedTrial] = (),
        bounds: Bounds | None = None,
    ) -> None:
        self._job = job
        self._uri = uri
        self._parent = parent_run_id
        self._runs: dict[str, str] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="parcelray-trials")
        self._pending: list[Future[None]] = []
        self._bounds = bounds
        self._search = MlflowRunLogger(uri, parent_run_id)
        self._finished: list[FinishedTrial] = []
        written = ended_children(uri, parent_run_id) if recorded else frozenset()
        for trial in recorded:
            if self._name(trial.key) in written:
                self._finished.append(trial)
            else:
                self.started(trial.key, trial.assignment)
                self.finished(trial)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except ParcelrayError:
            # An error that ends the search has priority. The trials that MLflow misses are written by --resume.
            if kind is None:
                raise

    def started(self, key: str, assignment: Assignment) -> None:
        """See `SearchObserver`."""
        self._pending.append(self._writer.submit(self._start, key, assignment))

    def reported(self, key: str, metrics: Mapping[str, float], steps: int) -> None:
        """See `SearchObserver`."""
        self._pending.append(self._writer.submit(self._log, key, metrics, steps))

    def finished(self, trial: FinishedTrial) -> None:
        """See `SearchObserver`."""
        self._pending.append(self._writer.submit(self._finish, trial))

    def close(self) -> None:
        """Waits until everything is written.

        Raises:
            ParcelrayError: the tracking store failed to write a trial.
        """
        self._writer.shutdown()
        for each in self._pending:
            try:
                each.result()
            except ParcelrayError:
                raise
            except Exception as error:  # whatever the store's client raises
                raise SystemFailure(
                    f"The tracking store failed to write a trial ({error}). The trial itself is recorded; re-run the"
                    " same command with --resume to write it to the tracking store."
                ) from error

    def _start(self, key: str, assignment: Assignment) -> None:
        params = flat_params(
            {name: str(value) if isinstance(value, list | tuple) else value for name, value in assignment.items()}
        )
        self._runs[key] = start_run(
            self._uri, self._job.tracking.experiment, self._name(key), params=params, parent_run_id=self._parent
        )

    def _finish(self, trial: FinishedTrial) -> None:
        # For a trial with one budget, the step of its scores is that budget, as in an evaluation, so that MLflow plots
        # the frontier.
        self._log(
            trial.key,
            dict(trial.metrics) | {"seconds": trial.seconds},
            int(trial.metrics.get("step", trial.metrics.get("tokens", 0))),
        )
        outcome = (
            f"failed: {trial.error}" if trial.error is not None else "stopped early" if trial.stopped else "finished"
        )
        MlflowRunLogger(self._uri, self._runs[trial.key]).set_tags({OUTCOME_TAG: outcome})
        self._finished.append(trial)
        if self._bounds is not None:
            self._search.log_metrics(
                {VOLUME: volumes(self._job, self._finished, self._bounds)[-1]}, len(self._finished)
            )
            self._search.close()
        end_run(self._uri, self._runs.pop(trial.key), "FAILED" if trial.error is not None else "FINISHED")

    def _log(self, key: str, metrics: Mapping[str, float], step: int) -> None:
        logger = MlflowRunLogger(self._uri, self._runs[key])
        logger.log_metrics({name: value for name, value in metrics.items() if value == value}, step)
        logger.close()

    def _name(self, key: str) -> str:
        return f"trial-{self._job.name}-{key}"


def best_of(job: TuneJob, trials: Sequence[FinishedTrial]) -> FinishedTrial | None:
    """Returns the trial with the best first objective, or None without trials.

    Ties are broken by the second objective, and so on, so that the trial is on the Pareto front.
    """
    complete = [
        trial
        for trial in trials
        if trial.error is None and all(each.metric in trial.metrics for each in job.objectives)
    ]
    return max(
        complete, key=lambda trial: [objective_value(each, trial.metrics) for each in job.objectives], default=None
    )


def bounds_of(objectives: Sequence[Objective], costs: Mapping[str, tuple[float, float]]) -> Bounds | None:
    """Returns the smallest and largest possible value of each objective; None if one of them is unknown.

    Args:
        objectives: objectives of the search.
        costs: smallest and largest value of each cost of an evaluation.
    """
    candidates = [
        objective.bounds or costs.get(objective.metric) or _SCALES.get(re.split("[/@]", objective.metric)[0])
        for objective in objectives
    ]
    bounds = [each for each in candidates if each is not None]
    return bounds if len(bounds) == len(candidates) else None


def volumes(job: TuneJob, trials: Sequence[FinishedTrial], bounds: Bounds) -> list[float]:
    """Returns the hypervolume after each trial (see `volume_over_time`); failed trials add nothing."""
    modes = [objective.mode for objective in job.objectives]
    values = [[trial.metrics.get(objective.metric, float("nan")) for objective in job.objectives] for trial in trials]
    box = np.sort(losses(list(zip(*bounds, strict=True)), modes), axis=0)
    return volume_over_time(losses(values, modes), box[0], box[1])


def describe(assignment: Assignment) -> str:
    """Returns a point in one line, with the last part of each key as the name of the parameter."""
    return ", ".join(f"{name.rpartition('.')[2]} {show_value(value)}" for name, value in assignment.items())


def show_value(value: Any) -> str:
    """Formats a parameter's value: a list of one item as the item, numbers with four digits."""
    item = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
    return f"{item:.4g}" if isinstance(item, float) else str(item)
