"""S3 storage while the store refuses connections, answers with errors, or does not answer."""

import logging
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from parcelray import s3_storage
from parcelray.errors import SystemFailure
from parcelray.evaluation.passes.store import Prediction, PredictionStore
from parcelray.files import download_files, open_storage, read_json, upload_files, write_json
from parcelray.s3_storage import PatientS3FileSystem
from parcelray.tuning.trial_record import FinishedTrial, TrialRecord

from .object_storage import Fault, FaultyProxy
from .processes import wait_until

FAULTS = pytest.mark.parametrize("fault", ["refuse", "reject", "ignore"])
PREDICTION = Prediction("k" * 64, "mini", "1", "sha256:" + "a" * 64, 16, "{}", "red", 1, False)
TRIAL = FinishedTrial("key", {"a": 1}, {"score": 1.0}, 1.0)


@pytest.fixture(autouse=True)
def _short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatientS3FileSystem, "read_timeout", 0.5)


@FAULTS
def test_reads_writes_and_listings_wait_for_a_store_that_is_unavailable(
    fault: Fault, s3: str, faulty_s3: FaultyProxy, tmp_path: Path
) -> None:
    filesystem, root = open_storage(s3)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "state.json").write_text("{}")
    upload_files(tmp_path / "checkpoint", filesystem, f"{root}/old")
    PredictionStore(f"{s3}/predictions").write([PREDICTION])
    TrialRecord(s3).add(TRIAL)
    operations = (
        lambda: read_json(f"{root}/old/state.json", "remove it", filesystem),
        lambda: write_json(f"{root}/new.json", [1], filesystem),
        lambda: len(filesystem.find(f"{root}/old")),
        lambda: filesystem.exists(f"{root}/none"),
        lambda: upload_files(tmp_path / "checkpoint", filesystem, f"{root}/new"),
        lambda: download_files(filesystem, f"{root}/old", tmp_path / "copy"),
        lambda: PredictionStore(f"{s3}/predictions").keys("mini", PREDICTION.model),
        lambda: [trial.key for trial in TrialRecord(s3).trials],
        lambda: TrialRecord(f"{s3}/other").add(TRIAL),
    )
    faulty_s3.fail(fault)
    with ThreadPoolExecutor(len(operations)) as pool:
        running = [pool.submit(operation) for operation in operations]
        if fault == "refuse":
            time.sleep(0.5)
        else:
            wait_until(lambda: faulty_s3.num_failed > 2 * len(operations), "all requests are tried again")
        assert not [each for each in running if each.done()]
        faulty_s3.work()
        results = [each.result() for each in running]
    assert results == [{}, None, 2, False, None, True, frozenset({PREDICTION.key}), ["key"], None]
    assert read_json(f"{root}/new.json", "", filesystem) == [1]
    assert filesystem.exists(f"{root}/new/state.json")
    assert TrialRecord(f"{s3}/other").get("key") == TRIAL


@FAULTS
def test_a_store_that_stays_unavailable_is_one_sentence(
    fault: Fault, s3: str, faulty_s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(s3_storage, "_PATIENCE_S", 0.2)
    monkeypatch.setattr(s3_storage, "_WARN_AFTER_S", 0.0)
    # One warning, however slowly the machine runs the test.
    monkeypatch.setattr(s3_storage, "_WARN_PERIOD_S", 1e6)
    monkeypatch.setattr(s3_storage, "_warned_at", -1e9)
    filesystem, root = open_storage(s3)
    faulty_s3.fail(fault)
    sentence = rf"^the object storage at {faulty_s3.url} has not answered for \d+ s \(.+\); check that it runs, .*\.$"
    for operation in (filesystem.ls, filesystem.cat_file, lambda path: filesystem.pipe_file(path, b"1")):
        with caplog.at_level(logging.WARNING), pytest.raises(SystemFailure, match=sentence):
            operation(f"{root}/a")
    assert len([record for record in caplog.records if "trying again" in record.message]) == 1


def test_another_process_gets_the_same_file_system(s3: str) -> None:
    filesystem, _ = open_storage(s3)
    assert type(pickle.loads(pickle.dumps(filesystem))) is PatientS3FileSystem
