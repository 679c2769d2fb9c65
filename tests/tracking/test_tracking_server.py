"""Runs, metrics and models through an MLflow tracking server, which a cluster of several nodes uses."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import save_file

from parcelray.evaluation.predict import PYFUNC_FILE
from parcelray.models.checkpoint import resolve_checkpoint
from parcelray.models.manifest import verify_manifest, write_manifest
from parcelray.tracking.mlflow_tracker import MlflowRunLogger, tracked_run
from parcelray.tracking.opening import settings_folder
from parcelray.tracking.registry import promote, register_model, resolve_registry

pytestmark = [pytest.mark.serving, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{root}/mlflow.db",
        "--artifacts-destination",
        str(root / "artifacts"),
    ]
    with (root / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=root,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(300)


def wait_until_healthy(url, process):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.2)
    pytest.fail(f"the MLflow server did not start (exit code {process.poll()})")


def test_runs_metrics_and_models_work_through_a_server(server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"weight": torch.ones(4)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    write_manifest(folder, config={}, git_commit=None, data={}, seed=0)

    with tracked_run(server, "remote", "train-a-00000000", params={"lr": 0.1}) as run_id:
        tracker = MlflowRunLogger(server, run_id)
        tracker.log_metrics({"train/loss": 1.0, "val/mini/accuracy@64": 0.5}, 3)
        tracker.close()
        version = register_model(server, folder, "parcel", run_id, pyfunc_file=PYFUNC_FILE)
        promote(server, "parcel", version)
    history = MlflowClient(tracking_uri=server).get_metric_history(run_id, "val/mini/accuracy:64")
    assert [metric.step for metric in history] == [3]

    pin = resolve_checkpoint(folder).pin.model_copy(update={"reference": "models:/parcel/1", "tracking_uri": server})
    settings = settings_folder(pin)
    assert {path.name for path in settings.iterdir()} == {"config.json", "manifest.json"}, "without the weights"
    first, pinned = resolve_registry("models:/parcel@champion", server)
    assert pinned == "models:/parcel/1"
    assert first.is_relative_to(tmp_path / "cache")
    verify_manifest(first)
    written = (first / "model.safetensors").stat().st_mtime_ns
    again, _ = resolve_registry("models:/parcel/1", server)
    assert (again / "model.safetensors").stat().st_mtime_ns == written, "the files are downloaded once"
