"""Request samples are written to MLflow in batches; samples that cannot be written are dropped and counted."""

import threading
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.artifacts import load_dict

from parcelray.tracking import request_samples
from parcelray.tracking.request_samples import RequestSamples

from ..stores import new_store

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload``:DeprecationWarning")


# Reached only if the code hangs: no test waits this long.
LONG_S = 300.0


def test_batches_are_written_as_tables_of_one_run(tmp_path: Path) -> None:
    uri = new_store(tmp_path)
    lost: list[int] = []
    samples = RequestSamples(uri, "served", "serve-mini-00000000", lost.append, batch=4, period_s=LONG_S)
    for number in range(10):
        samples.put({"request_id": f"r{number}", "visual_tokens": 64} | ({"answer": "red"} if number == 9 else {}))
    samples.close(LONG_S)
    assert lost == []
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("served")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("serve-mini-00000000", "FINISHED")
    tables = [
        load_dict(f"{run.info.artifact_uri}/{file.path}") for file in client.list_artifacts(run.info.run_id, "samples")
    ]
    assert [len(table["data"]) for table in tables] == [4, 4, 2]
    assert tables[0] == {
        "columns": ["request_id", "visual_tokens"],
        "data": [[f"r{number}", 64] for number in range(4)],
    }
    assert tables[2] == {
        "columns": ["request_id", "visual_tokens", "answer"],
        "data": [["r8", 64, None], ["r9", 64, "red"]],
    }


def test_a_table_that_is_not_full_is_written_after_the_period(monkeypatch: pytest.MonkeyPatch) -> None:
    written = threading.Event()
    tables: list[Any] = []

    class Client:
        def __init__(self, tracking_uri: str) -> None:
            pass

        def log_dict(self, run_id: str, table: Any, path: str) -> None:
            tables.append(table)
            written.set()

    monkeypatch.setattr(request_samples, "start_run", lambda *_, **__: "run")
    monkeypatch.setattr(request_samples, "end_run", lambda *_: None)
    monkeypatch.setattr(request_samples, "MlflowClient", Client)
    samples = RequestSamples(
        "sqlite:///nowhere.db", "served", "serve-mini-00000000", lambda _: None, batch=100, period_s=0.01
    )
    samples.put({"request_id": "alone"})
    assert written.wait(LONG_S)
    assert tables == [{"columns": ["request_id"], "data": [["alone"]]}]
    samples.close(LONG_S)


def test_records_beyond_the_capacity_are_dropped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the store hangs, `put` returns at once."""
    hanging, proceed = threading.Event(), threading.Event()

    def start(*arguments: Any, **_: Any) -> str:
        hanging.set()
        proceed.wait(LONG_S)
        raise ConnectionError("the store is not reachable")

    monkeypatch.setattr(request_samples, "start_run", start)
    lost: list[int] = []
    samples = RequestSamples("sqlite:///nowhere.db", "served", "serve-mini-00000000", lost.append, capacity=5, batch=1)
    samples.put({"request_id": "first"})
    assert hanging.wait(LONG_S)
    for number in range(8):
        samples.put({"request_id": f"r{number}"})
    assert lost == [1, 1, 1], "five records are queued, three exceed the capacity"
    proceed.set()
    samples.close(LONG_S)
    assert sum(lost) == 9, "the queued records could not be written"
