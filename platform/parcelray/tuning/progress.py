"""What happens in a search, for the reader at the console and for MLflow."""

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
"""Of a trial's run: finished, stopped early, or failed and with what; a later try overwrites it."""
VOLUME = "search/hypervolume"
"""Metric of the search's run, by the number of finished trials."""
Bounds = Sequence[tuple[float, float]]
"""Smallest and largest value of each objective."""
_SCALES = {"score": (0.0, 100.0), "retention": (0.0, 100.0), "val": (0.0, 1.0)}
_QUIET_SECONDS = 5.0
"""Shortest time between two lines of a search whose trials are quick."""


class SearchProgress:
    """Prints one line as trials finish, with done, running, failed, the best so far, the hypervolume and the time left; see `SearchObserver`.

    Args:
        job: the search.
        planner: knows how many points there are.
        record: holds the finished trials.
        console: for the lines.
        bounds: of the objectives, see `bounds_of`.
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
        if is_last or time.monotonic() - self._shown_at >= _QUIET_SECONDS:
            self._shown_at = time.monotonic()
            self._console.print(self.line(), markup=False)

    def line(self) -> str:
        """The state of the search in one line."""
        trials = self._record.trials
        good = [trial for trial in trials if trial.error is None]
        parts = [
            f"{len(good)} of {self._planner.num_points} trials done",
            f"{len(self._running)} running",
            f"{len(trials) - len(good)} failed",
        ]
        best = best_of(self._job, trials)
        if best is not None:
            first = self._job.objectives[0]
            parts.append(f"best {first.metric} {best.metrics[first.metric]:.4g} at {describe(best.assignment)}")
        if len(self._job.objectives) > 1 and good and self._bounds is not None:
            parts.append(f"hypervolume {volumes(self._job, trials, self._bounds)[-1]:.3f}")
        new = len(trials) - self._before
        if new > 0 and len(trials) < self._planner.num_points:
            left = (time.monotonic() - self._began) / new * (self._planner.num_points - len(trials))
            parts.append(f"about {left / 60:.0f} min left" if left > 90 else f"about {left:.0f} s left")
        return f"{self._job.name}: {', '.join(parts)}"


class TrialRuns:
    """One MLflow run a trial, below the search's, written by a thread of its own: the store answers more slowly than a warm trial does.

    Trials that were recorded by a driver which was killed before it could tell MLflow are told now. See
    `SearchObserver`.

    Args:
        job: the search.
        uri: of the tracking store.
        parent_run_id: the search's run.
        known: trials that are recorded.
        bounds: of the objectives, see `bounds_of`.
    """

    def __init__(
        self,
        job: TuneJob,
        uri: str,
        parent_run_id: str,
        known: Sequence[FinishedTrial] = (),
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
        told = ended_children(uri, parent_run_id) if known else frozenset()
        for trial in known:
            if self._name(trial.key) in told:
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
            # What ends the search already is the first thing to say; what MLflow was not told, --resume tells it.
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
            ParcelrayError: the store did not take something.
        """
        self._writer.shutdown()
        for each in self._pending:
            try:
                each.result()
            except ParcelrayError:
                raise
            except Exception as error:  # whatever the store's client raises
                raise SystemFailure(
                    f"The tracking store did not take a trial ({error}); it is recorded all the same, and --resume"
                    " tells the store."
                ) from error

    def _start(self, key: str, assignment: Assignment) -> None:
        params = flat_params(
            {name: str(value) if isinstance(value, list | tuple) else value for name, value in assignment.items()}
        )
        self._runs[key] = start_run(
            self._uri, self._job.tracking.experiment, self._name(key), params=params, parent_run_id=self._parent
        )

    def _finish(self, trial: FinishedTrial) -> None:
        # Scores of a trial with one budget have it as their step, as those of an evaluation do, so that MLflow draws
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
            self._search.flush()
        end_run(self._uri, self._runs.pop(trial.key), "FAILED" if trial.error is not None else "FINISHED")

    def _log(self, key: str, metrics: Mapping[str, float], step: int) -> None:
        logger = MlflowRunLogger(self._uri, self._runs[key])
        logger.log_metrics({name: value for name, value in metrics.items() if value == value}, step)
        logger.flush()

    def _name(self, key: str) -> str:
        return f"trial-{self._job.name}-{key}"


class Observers:
    """Tells several; see `SearchObserver`."""

    def __init__(self, members: Sequence[SearchProgress | TrialRuns]) -> None:
        self._members = members

    def started(self, key: str, assignment: Assignment) -> None:
        """See `SearchObserver`."""
        for member in self._members:
            member.started(key, assignment)

    def reported(self, key: str, metrics: Mapping[str, float], steps: int) -> None:
        """See `SearchObserver`."""
        for member in self._members:
            member.reported(key, metrics, steps)

    def finished(self, trial: FinishedTrial) -> None:
        """See `SearchObserver`."""
        for member in self._members:
            member.finished(trial)


def best_of(job: TuneJob, trials: Sequence[FinishedTrial]) -> FinishedTrial | None:
    """The trial with the best first objective; of equal ones that with the best second, and so on, which is on the front."""
    good = [
        trial
        for trial in trials
        if trial.error is None and all(each.metric in trial.metrics for each in job.objectives)
    ]
    return max(good, key=lambda trial: [objective_value(each, trial.metrics) for each in job.objectives], default=None)


def bounds_of(objectives: Sequence[Objective], costs: Mapping[str, tuple[float, float]]) -> Bounds | None:
    """Smallest and largest value that each objective can have, as far as that is known before the search; None where one is not.

    Args:
        objectives: of the search.
        costs: what is known of an evaluation's costs.
    """
    known = [
        objective.bounds or costs.get(objective.metric) or _SCALES.get(re.split("[/@]", objective.metric)[0])
        for objective in objectives
    ]
    found = [each for each in known if each is not None]
    return found if len(found) == len(known) else None


def volumes(job: TuneJob, trials: Sequence[FinishedTrial], bounds: Bounds) -> list[float]:
    """Hypervolume after each trial, see `volume_over_time`; failed ones add nothing."""
    modes = [objective.mode for objective in job.objectives]
    values = [[trial.metrics.get(objective.metric, float("nan")) for objective in job.objectives] for trial in trials]
    box = np.sort(losses(list(zip(*bounds, strict=True)), modes), axis=0)
    return volume_over_time(losses(values, modes), box[0], box[1])


def describe(assignment: Assignment) -> str:
    """A point in one line, each parameter by the last part of its key."""
    return ", ".join(f"{name.rpartition('.')[2]} {show_value(value)}" for name, value in assignment.items())


def show_value(value: Any) -> str:
    """A parameter's value: a list of one as what it holds, numbers with four digits."""
    plain = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
    return f"{plain:.4g}" if isinstance(plain, float) else str(plain)
