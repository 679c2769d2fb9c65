"""Early stopping of a resumed search stops the same trainings as an uninterrupted search."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from parcelray.config.tune import AshaScheduler, EarlyStopping, MedianScheduler
from parcelray.errors import UserError
from parcelray.tuning.resumable_scheduler import Report, ReportHistory, ResumableScheduler
from parcelray.tuning.training_trial import early_stopping
from parcelray.tuning.trial_record import point_key
from parcelray.tuning.tune_run import SCALAR, STEPS

TOTAL_STEPS = 8
SCORES = [0.5, 0.8, 0.3, 0.9, 0.4, 0.6, 0.85, 0.1, 0.7, 0.95]
"""Final score of each training."""
ASHA = AshaScheduler(grace_steps=1, reduction=2)
MEDIAN = MedianScheduler(grace_steps=2, min_trials=2)
EVERY_SCHEDULER = pytest.mark.parametrize("config", [ASHA, MEDIAN], ids=lambda each: each.type)


class _Controller:
    """The part of Tune's controller that schedulers use."""

    def get_live_trials(self) -> list[Any]:
        return []


def _scheduler(config: EarlyStopping, folder: Path) -> Any:
    scheduler = early_stopping(config, TOTAL_STEPS, folder)
    assert scheduler is not None
    return scheduler


def _trial(number: int) -> Any:
    # Tune makes a new trial with a new id each time that a search is resumed.
    return SimpleNamespace(trial_id=object(), config={"assignment": {"a": number}})


def _value(number: int, step: int) -> float:
    """Returns the score at a step; the trainings improve at different speeds, so their order changes."""
    return SCORES[number] * min(1.0, step / (2 + number % 5))


class _Search:
    """Two trainings at a time, which report in turn; finished trainings survive a killed driver, as in the record."""

    def __init__(self, config: EarlyStopping, folder: Path) -> None:
        self.config = config
        self.folder = folder
        self.lengths: dict[int, int] = {}
        """Steps at which each training ended."""
        self._checkpoints: dict[int, int] = {}

    def session(self) -> Iterator[None]:
        """Runs a driver that may be killed at each report."""
        scheduler, controller = _scheduler(self.config, self.folder), _Controller()
        waiting = [number for number in range(len(SCORES)) if number not in self.lengths]
        running: list[tuple[int, Any]] = []
        while waiting or running:
            while waiting and len(running) < 2:
                number = waiting.pop(0)
                trial = _trial(number)
                scheduler.on_trial_add(controller, trial)
                running.append((number, trial))
            number, trial = running.pop(0)
            step = self._checkpoints.get(number, 0) + 1
            result = {STEPS: step, SCALAR: _value(number, step)}
            # The checkpoint is written before its report.
            self._checkpoints[number] = step
            decision = scheduler.on_trial_result(controller, trial, result)
            if decision == TrialScheduler.STOP or step == TOTAL_STEPS:
                scheduler.on_trial_complete(controller, trial, result)
                self.lengths[number] = step
            else:
                running.append((number, trial))
            yield


def _all(search: _Search) -> dict[int, int]:
    for _ in search.session():
        pass
    return search.lengths


@EVERY_SCHEDULER
def test_a_resumed_search_stops_the_same_trainings_as_an_uninterrupted_one(
    tmp_path: Path, config: EarlyStopping
) -> None:
    uninterrupted = _all(_Search(config, tmp_path / "uninterrupted"))
    assert len(set(uninterrupted.values())) > 1, "some are stopped, and not all at the same step"
    for killed_at in range(1, sum(uninterrupted.values()), 4):
        search = _Search(config, tmp_path / str(killed_at))
        session = search.session()
        for _ in range(killed_at):
            next(session)
        assert _all(search) == uninterrupted, f"killed after {killed_at} reports"


@EVERY_SCHEDULER
def test_without_the_stored_reports_the_decisions_differ(tmp_path: Path, config: EarlyStopping) -> None:
    uninterrupted = _all(_Search(config, tmp_path / "uninterrupted"))
    search = _Search(config, tmp_path / "killed")
    session = search.session()
    for _ in range(sum(uninterrupted.values()) // 2):
        next(session)
    (tmp_path / "killed" / "reports.jsonl").unlink()
    assert _all(search) != uninterrupted


def test_a_step_is_neither_decided_again_nor_counted_twice(tmp_path: Path) -> None:
    before = _scheduler(MEDIAN, tmp_path)
    for number in range(2):
        for step in (1, 2, 3):
            before.on_trial_result(_Controller(), _trial(number), {STEPS: step, SCALAR: 1.0})
    again = _scheduler(MEDIAN, tmp_path)
    assert again.on_trial_result(_Controller(), _trial(1), {STEPS: 2, SCALAR: -9.0}) == TrialScheduler.CONTINUE
    assert [(report.steps, report.value) for report in ReportHistory(tmp_path).reports] == [
        (1, 1.0),
        (2, 1.0),
        (3, 1.0),
    ] * 2


def test_a_trial_is_stopped_at_its_next_report_if_the_driver_was_killed_before_stopping_it(tmp_path: Path) -> None:
    history = ReportHistory(tmp_path)
    for number, value in enumerate((0.9, 0.8, 0.1)):
        history.add(Report(point_key({"a": number}), 1, value))
    again = _scheduler(ASHA, tmp_path)
    assert isinstance(again, ResumableScheduler)
    assert again.on_trial_result(_Controller(), _trial(2), {STEPS: 2, SCALAR: 5.0}) == TrialScheduler.STOP
    assert again.on_trial_result(_Controller(), _trial(0), {STEPS: 2, SCALAR: 0.9}) == TrialScheduler.CONTINUE


def test_an_end_that_is_reported_twice_counts_once(tmp_path: Path) -> None:
    # The driver was killed after the end of the trial reached the scheduler, and before the trial was recorded. So the
    # resumed search runs the trial again, and it repeats its last report.
    before, last = _scheduler(ASHA, tmp_path), {STEPS: 8, SCALAR: 0.5}
    before.on_trial_add(_Controller(), _trial(0))
    before.on_trial_result(_Controller(), _trial(0), last)
    before.on_trial_complete(_Controller(), _trial(0), last)
    again = _scheduler(ASHA, tmp_path)
    again.on_trial_add(_Controller(), _trial(0))
    again.on_trial_result(_Controller(), _trial(0), last)
    again.on_trial_complete(_Controller(), _trial(0), last)
    assert [report.ended for report in ReportHistory(tmp_path).reports] == [False, True]


def test_an_invalid_report_is_named_and_one_that_was_cut_off_is_removed(tmp_path: Path) -> None:
    history = ReportHistory(tmp_path)
    for step in (1, 2):
        history.add(Report("a", step, 0.5))
    file = tmp_path / "reports.jsonl"
    file.write_text(file.read_text() + '{"key": "a", "ste')
    assert ReportHistory(tmp_path).reports == history.reports
    file.write_text("not json\n" + file.read_text())
    with pytest.raises(UserError, match=r"reports.jsonl, line 1, is not a report of a training .*; remove the line"):
        ReportHistory(tmp_path)
