"""The record of finished trials survives a killed driver."""

from pathlib import Path

import pytest

from parcelray.errors import UserError
from parcelray.files import open_storage
from parcelray.tuning.trial_record import FinishedTrial, TrialRecord, point_key


def _trial(value: int, error: str | None = None) -> FinishedTrial:
    assignment = {"a": value, "budgets": [value]}
    return FinishedTrial(
        point_key(assignment), assignment, {} if error else {"score": float(value), "none": float("nan")}, 1.5, error
    )


@pytest.fixture(params=["path", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A run folder on a disk and on object storage."""
    return {"path": str(tmp_path), "memory": f"memory://{tmp_path}"}.get(request.param) or str(
        request.getfixturevalue("s3")
    )


def test_a_record_is_read_back_as_written(folder: str) -> None:
    assert TrialRecord(folder).trials == ()
    record = TrialRecord(folder)
    for trial in (_trial(1), _trial(2, "it broke")):
        record.add(trial)
    again = TrialRecord(folder)
    assert [(trial.key, trial.assignment, trial.error) for trial in again.trials] == [
        (trial.key, trial.assignment, trial.error) for trial in record.trials
    ]
    assert again.trials[0].metrics == {"score": 1.0}
    assert point_key({"budgets": [1], "a": 1}) == again.trials[0].key, "the order of keys does not matter"


def test_a_line_that_was_cut_off_is_removed(tmp_path: Path) -> None:
    record = TrialRecord(tmp_path)
    record.add(_trial(1))
    file = tmp_path / "trials.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + whole[: len(whole) // 2])
    again = TrialRecord(tmp_path)
    assert len(again.trials) == 1
    again.add(_trial(2))
    assert [trial.assignment["a"] for trial in TrialRecord(tmp_path).trials] == [1, 2]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    record = TrialRecord(tmp_path)
    record.add(_trial(1))
    file = tmp_path / "trials.jsonl"
    file.write_text("not json\n" + file.read_text())
    with pytest.raises(UserError, match=r"trials.jsonl, line 1, is not a finished trial"):
        TrialRecord(tmp_path)


def test_two_drivers_of_a_search_on_object_storage_lose_no_trial(s3: str, tmp_path: Path) -> None:
    first, second = TrialRecord(s3), TrialRecord(s3)
    first.add(_trial(1))
    second.add(_trial(2))
    first.add(_trial(3))
    assert [trial.assignment["a"] for trial in TrialRecord(s3).trials] == [1, 2, 3]
    # A copy on a disk is continued in the same form.
    filesystem, path = open_storage(s3)
    filesystem.get(path, str(tmp_path / "copy"), recursive=True)
    TrialRecord(tmp_path / "copy").add(_trial(4))
    assert [trial.assignment["a"] for trial in TrialRecord(tmp_path / "copy").trials] == [1, 2, 3, 4]


def test_failed_trials_can_be_forgotten_and_run_again(folder: str) -> None:
    record = TrialRecord(folder)
    record.add(_trial(1))
    record.add(_trial(2, "it broke"))
    assert record.forget_failed() == 1
    assert [trial.assignment["a"] for trial in record.trials] == [1]
    record.add(_trial(2))
    assert [(trial.assignment["a"], trial.error) for trial in TrialRecord(folder).trials] == [
        (1, None),
        (2, None),
    ], "the last attempt counts"
