"""Samples of requests reach MLflow in batches, and those that it cannot take cost nothing but themselves."""

import threading
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.artifacts import load_dict

from parcelray.tracking import request_samples
from parcelray.tracking.request_samples import RequestSamples
from parcelray.tracking.store import ensure_store

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload``:DeprecationWarning")


def test_batches_are_tables_of_one_run(tmp_path: Path) -> None:
    uri = ensure_store(f"sqlite:///{tmp_path}/mlflow.db")
    lost: list[int] = []
    samples = RequestSamples(uri, "served", "serve-mini-00000000", lost.append, batch=4, period_s=0.2)
    for number in range(10):
        samples.put({"request_id": f"r{number}", "visual_tokens": 64} | ({"answer": "red"} if number == 9 else {}))
    samples.close()
    assert lost == []
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("served")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("serve-mini-00000000", "FINISHED")
    tables = [load_dict(f"{run.info.artifact_uri}/{file.path}") for file in client.list_artifacts(run.info.run_id, "samples")]
    assert [len(table["data"]) for table in tables] == [4, 4, 2]
    assert tables[0] == {"columns": ["request_id", "visual_tokens"], "data": [[f"r{number}", 64] for number in range(4)]}
    assert tables[2] == {"columns": ["request_id", "visual_tokens", "answer"], "data": [["r8", 64, None], ["r9", 64, "red"]]}


def test_what_comes_too_fast_is_dropped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store hangs: nobody who puts a record waits for it."""
    hanging, go_on = threading.Event(), threading.Event()

    def start(*arguments: Any, **_: Any) -> str:
        hanging.set()
        go_on.wait(20)
        raise ConnectionError("the store is away")

    monkeypatch.setattr(request_samples, "start_run", start)
    lost: list[int] = []
    samples = RequestSamples("sqlite:///nowhere.db", "served", "serve-mini-00000000", lost.append, capacity=5, batch=1)
    samples.put({"request_id": "first"})
    assert hanging.wait(20)
    for number in range(8):
        samples.put({"request_id": f"r{number}"})
    assert lost == [1, 1, 1], "five wait, three were too many"
    go_on.set()
    samples.close()
    assert sum(lost) == 9, "and the others could not be written"
