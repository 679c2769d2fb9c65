"""Early stopping that continues unchanged after an interruption of the search.

The reports of all trainings are stored in `reports.jsonl`. A resumed search replays them into a new Tune scheduler.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from parcelray.tuning.trial_record import LineFile, point_key
from parcelray.tuning.tune_run import SCALAR, STEPS

_FILE = "reports.jsonl"


class Report(NamedTuple):
    """One report of a training to early stopping, or the end of a training."""

    key: str
    """Key of its point (see `point_key`)."""
    steps: int
    """Steps trained so far."""
    value: float
    """First objective; larger is better."""
    ended: bool = False
    """Whether this line records the end of the trial, after the report with the same values."""

    @property
    def result(self) -> dict[str, Any]:
        """The report as a result of Tune's schedulers."""
        return {STEPS: self.steps, SCALAR: self.value}


class ReportHistory:
    """The reports of all trainings of a search, in the order in which they arrived.

    Args:
        folder: run folder of the search, or its URI.

    Raises:
        UserError: `reports.jsonl` has a line that is not a report.
    """

    def __init__(self, folder: str | Path) -> None:
        self._lines = LineFile(folder, _FILE)
        remedy = "remove the line; early stopping then ignores this report"
        self.reports = self._lines.read(Report, what="a report of a training", remedy=remedy)

    def add(self, report: Report) -> None:
        """Adds a report, and returns once it is on disk."""
        self._lines.append(report._asdict())
        self.reports.append(report)


@dataclass(frozen=True)
class _TrialOfPoint:
    """A trial identified by the key of its point; Tune's own trials get new ids each time that a search is resumed."""

    trial_id: str


class _NoLiveTrials:
    """The part of Tune's controller that the schedulers use, while no trial is running."""

    def get_live_trials(self) -> tuple[Trial, ...]:
        return ()


_REPLAY: Any = _NoLiveTrials()


class ResumableScheduler(TrialScheduler):
    """Asynchronous early stopping (ASHA, median rule) that continues with the reports of earlier sessions.

    Both rules decide by the identity of a trial and the reports so far, so the same reports in the same order restore
    the same state. A step that was already decided on is neither decided again nor counted twice.

    Args:
        scheduler: a new scheduler of Tune.
        history: the reports of the search.
    """

    def __init__(self, scheduler: TrialScheduler, history: ReportHistory) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._metric = SCALAR
        self._scheduler = scheduler
        self._history = history
        self._last: dict[str, Report] = {}
        self._stopped: set[str] = set()
        for report in history.reports:
            if report.key not in self._last:
                scheduler.on_trial_add(_REPLAY, _trial_of(report.key))
            self._apply(_REPLAY, report)

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """See `TrialScheduler`."""
        if _key(trial) not in self._last:
            self._scheduler.on_trial_add(tune_controller, _trial_of(_key(trial)))

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: Mapping[str, Any]) -> str:
        """See `TrialScheduler`."""
        if STEPS not in result or SCALAR not in result:
            return self.CONTINUE
        report = Report(_key(trial), int(result[STEPS]), float(result[SCALAR]))
        if report.key in self._stopped:
            # The search was interrupted between the decision and the end of the trial.
            return self.STOP
        if report.key in self._last and report.steps <= self._last[report.key].steps:
            return self.CONTINUE
        self._history.add(report)
        return self._apply(tune_controller, report)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: Mapping[str, Any]) -> None:
        """See `TrialScheduler`."""
        last = self._last.get(_key(trial))
        if last is not None and not last.ended:
            end = last._replace(ended=True)
            self._history.add(end)
            self._apply(tune_controller, end)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """See `TrialScheduler`."""
        self._scheduler.on_trial_error(tune_controller, _trial_of(_key(trial)))

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """See `TrialScheduler`."""
        if _key(trial) not in self._last or not self._last[_key(trial)].ended:
            self._scheduler.on_trial_remove(tune_controller, _trial_of(_key(trial)))

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """See `TrialScheduler`."""
        return self._scheduler.choose_trial_to_run(tune_controller)

    def debug_string(self) -> str:
        """See `TrialScheduler`."""
        return self._scheduler.debug_string()

    def _apply(self, tune_controller: Any, report: Report) -> str:
        self._last[report.key] = report
        if report.ended:
            self._scheduler.on_trial_complete(tune_controller, _trial_of(report.key), report.result)
            return self.CONTINUE
        decision = self._scheduler.on_trial_result(tune_controller, _trial_of(report.key), report.result)
        if decision == self.STOP:
            self._stopped.add(report.key)
        return decision


def _trial_of(key: str) -> Any:
    return _TrialOfPoint(key)


def _key(trial: Trial) -> str:
    return point_key(trial.config["assignment"])
