"""Early stopping that a search which goes on takes up where it was: what trainings reported is on disk, and told to Tune's scheduler again."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from parcelray.tuning.json_lines import append_line, read_lines
from parcelray.tuning.trial_record import point_key
from parcelray.tuning.tune_run import SCALAR, STEPS

_FILE = "reports.jsonl"


class Report(NamedTuple):
    """What early stopping was told of a training."""

    key: str
    """Of its point, see `point_key`."""
    steps: int
    """Of the training so far."""
    value: float
    """First objective, more being better."""
    ended: bool = False
    """Whether it says that the trial ended with the report before."""

    @property
    def result(self) -> dict[str, Any]:
        """As Tune's schedulers read it."""
        return {STEPS: self.steps, SCALAR: self.value}


class ReportHistory:
    """The reports of all trainings of a search in a folder, in the order in which they came.

    Args:
        folder: of the search.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _FILE
        remedy = "remove the line, and early stopping does without the report"
        self.reports = read_lines(self._path, Report, what="report of a training", remedy=remedy)

    def add(self, report: Report) -> None:
        """Adds a report; it is on disk when this returns."""
        append_line(self._path, report._asdict())
        self.reports.append(report)


@dataclass(frozen=True)
class _KnownTrial:
    """A trial by its point, as Tune's schedulers tell trials apart; Tune's own have new ids each time that a search goes on."""

    trial_id: str


class _NoneLive:
    """Tune's controller, as far as these schedulers ask it, between two sessions of a search."""

    def get_live_trials(self) -> tuple[Trial, ...]:
        return ()


_BETWEEN: Any = _NoneLive()


class RememberingScheduler(TrialScheduler):
    """Asynchronous early stopping (ASHA, median) whose rungs and means know what was reported before the search was interrupted.

    Both decide by a trial's identity and the reports so far, so the same reports in the same order make the same state.
    A step of a training that was decided on before is not decided on again, nor counted twice.

    Args:
        scheduler: of Tune, new.
        history: of the search.
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
                scheduler.on_trial_add(_BETWEEN, _known(report.key))
            self._take(_BETWEEN, report)

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """See `TrialScheduler`."""
        if _key(trial) not in self._last:
            self._scheduler.on_trial_add(tune_controller, _known(_key(trial)))

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
        return self._take(tune_controller, report)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: Mapping[str, Any]) -> None:
        """See `TrialScheduler`."""
        last = self._last.get(_key(trial))
        if last is not None and not last.ended:
            end = last._replace(ended=True)
            self._history.add(end)
            self._take(tune_controller, end)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """See `TrialScheduler`."""
        self._scheduler.on_trial_error(tune_controller, _known(_key(trial)))

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """See `TrialScheduler`."""
        if _key(trial) not in self._last or not self._last[_key(trial)].ended:
            self._scheduler.on_trial_remove(tune_controller, _known(_key(trial)))

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """See `TrialScheduler`."""
        return self._scheduler.choose_trial_to_run(tune_controller)

    def debug_string(self) -> str:
        """See `TrialScheduler`."""
        return self._scheduler.debug_string()

    def _take(self, tune_controller: Any, report: Report) -> str:
        self._last[report.key] = report
        if report.ended:
            self._scheduler.on_trial_complete(tune_controller, _known(report.key), report.result)
            return self.CONTINUE
        decision = self._scheduler.on_trial_result(tune_controller, _known(report.key), report.result)
        if decision == self.STOP:
            self._stopped.add(report.key)
        return decision


def _known(key: str) -> Any:
    return _KnownTrial(key)


def _key(trial: Trial) -> str:
    return point_key(trial.config["assignment"])
