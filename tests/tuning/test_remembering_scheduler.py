"""A search that goes on stops the trainings that an undisturbed one stops."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from parcelray.config.tune import AshaScheduler, EarlyStopping, MedianScheduler
from parcelray.errors import UserError
from parcelray.tuning.remembering_scheduler import RememberingScheduler, Report, ReportHistory
from parcelray.tuning.training_trial import early_stopping
from parcelray.tuning.trial_record import point_key
from parcelray.tuning.tune_run import SCALAR, STEPS

STEPS_IN_ALL = 8
SCORES = [0.5, 0.8, 0.3, 0.9, 0.4, 0.6, 0.85, 0.1, 0.7, 0.95]
"""Of each training, at its end."""
ASHA = AshaScheduler(grace_steps=1, reduction=2)
MEDIAN = MedianScheduler(grace_steps=2, min_trials=2)
EVERY_SCHEDULER = pytest.mark.parametrize("config", [ASHA, MEDIAN], ids=lambda each: each.type)


class _Controller:
    """Tune's, as far as schedulers ask it."""

    def get_live_trials(self) -> list[Any]:
        return []


def _scheduler(config: EarlyStopping, folder: Path) -> Any:
    scheduler = early_stopping(config, STEPS_IN_ALL, folder)
    assert scheduler is not None
    return scheduler


def _trial(number: int) -> Any:
    # Tune makes a new trial with a new id each time that a search goes on.
    return SimpleNamespace(trial_id=object(), config={"assignment": {"a": number}})


def _value(number: int, step: int) -> float:
    """Trainings rise to their scores at different speeds, so that their order changes on the way."""
    return SCORES[number] * min(1.0, step / (2 + number % 5))


class _Search:
    """Two trainings at a time, which report in turn; what it knows of finished ones outlives its driver, as the record does."""

    def __init__(self, config: EarlyStopping, folder: Path) -> None:
        self.config = config
        self.folder = folder
        self.lengths: dict[int, int] = {}
        """Steps at which each training ended."""
        self._checkpoints: dict[int, int] = {}

    def session(self) -> Iterator[None]:
        """A driver that may be killed at each report."""
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
            if decision == TrialScheduler.STOP or step == STEPS_IN_ALL:
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
def test_a_search_that_goes_on_stops_what_an_undisturbed_one_stops(tmp_path: Path, config: EarlyStopping) -> None:
    undisturbed = _all(_Search(config, tmp_path / "undisturbed"))
    assert len(set(undisturbed.values())) > 1, "some are stopped, and not all at the same step"
    for killed_at in range(1, sum(undisturbed.values()), 4):
        search = _Search(config, tmp_path / str(killed_at))
        session = search.session()
        for _ in range(killed_at):
            next(session)
        assert _all(search) == undisturbed, f"killed after {killed_at} reports"


@EVERY_SCHEDULER
def test_without_what_was_reported_it_would_decide_otherwise(tmp_path: Path, config: EarlyStopping) -> None:
    undisturbed = _all(_Search(config, tmp_path / "undisturbed"))
    search = _Search(config, tmp_path / "killed")
    session = search.session()
    for _ in range(sum(undisturbed.values()) // 2):
        next(session)
    (tmp_path / "killed" / "reports.jsonl").unlink()
    assert _all(search) != undisturbed


def test_a_step_that_was_decided_on_is_neither_decided_on_again_nor_counted_twice(tmp_path: Path) -> None:
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


def test_a_trial_whose_driver_was_killed_before_it_could_stop_it_is_stopped_at_its_next_report(tmp_path: Path) -> None:
    history = ReportHistory(tmp_path)
    for number, value in enumerate((0.9, 0.8, 0.1)):
        history.add(Report(point_key({"a": number}), 1, value))
    again = _scheduler(ASHA, tmp_path)
    assert isinstance(again, RememberingScheduler)
    assert again.on_trial_result(_Controller(), _trial(2), {STEPS: 2, SCALAR: 5.0}) == TrialScheduler.STOP
    assert again.on_trial_result(_Controller(), _trial(0), {STEPS: 2, SCALAR: 0.9}) == TrialScheduler.CONTINUE


def test_an_end_that_was_told_twice_counts_once(tmp_path: Path) -> None:
    # The driver was killed after the scheduler knew of the end, and before it was recorded: the trial comes again with
    # its last report.
    before, last = _scheduler(ASHA, tmp_path), {STEPS: 8, SCALAR: 0.5}
    before.on_trial_add(_Controller(), _trial(0))
    before.on_trial_result(_Controller(), _trial(0), last)
    before.on_trial_complete(_Controller(), _trial(0), last)
    again = _scheduler(ASHA, tmp_path)
    again.on_trial_add(_Controller(), _trial(0))
    again.on_trial_result(_Controller(), _trial(0), last)
    again.on_trial_complete(_Controller(), _trial(0), last)
    assert [report.ended for report in ReportHistory(tmp_path).reports] == [False, True]


def test_a_broken_report_is_named_and_one_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    history = ReportHistory(tmp_path)
    for step in (1, 2):
        history.add(Report("a", step, 0.5))
    file = tmp_path / "reports.jsonl"
    file.write_text(file.read_text() + '{"key": "a", "ste')
    assert ReportHistory(tmp_path).reports == history.reports
    file.write_text("not json\n" + file.read_text())
    with pytest.raises(UserError, match=r"reports.jsonl, line 1, is no report of a training .*; remove the line"):
        ReportHistory(tmp_path)
