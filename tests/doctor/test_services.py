"""Checks of Ray, the MLflow store, storage, cluster and hub: each failure is provoked, and each has a remedy."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import ray
from fsspec.implementations.memory import MemoryFileSystem
from huggingface_hub import constants
from mlflow import MlflowClient

from parcelray.cluster.preflight import local_ray_version
from parcelray.cluster.worker_start import actor_round_trip
from parcelray.doctor import services
from parcelray.errors import SystemFailure

from ..stores import new_store
from .test_machine import _is


@pytest.fixture(autouse=True)
def nothing_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ("RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    for name in (*names, "HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


class _Server(BaseHTTPRequestHandler):
    """Answers requests of Ray's dashboard, which may need a token, and of a hub with one model."""

    token: str | None = None

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        allowed = self.token is None or self.headers.get("Authorization") == f"Bearer {self.token}"
        answers = {
            "/api/version": {"ray_version": local_ray_version()},
            "/api/models": [],
            "/api/models/org/model": {"id": "org/model", "sha": "0" * 40},
            "/api/models/org/model/revision/main": {"id": "org/model", "sha": "0" * 40},
        }
        self.send_response(401 if not allowed else 200 if path in answers else 404)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answers.get(path, {"error": "not found"})).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(_Server, "token", None)
    server = HTTPServer(("127.0.0.1", 0), _Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.ray
def test_an_actor_answers(ray_session: None) -> None:
    _is(services.check_ray(), "pass", "an actor answers")


def test_a_ray_that_does_not_start_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Without a connection of an earlier test.
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "r\u00e4y"))
    _is(services.check_ray(), "fail", "outside ASCII", "set RAY_TMPDIR")


def test_an_actor_that_does_not_answer_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Actor:
        answer = type("Method", (), {"remote": staticmethod(lambda: None)})

    def get(reference: object, timeout: float) -> None:
        raise ray.exceptions.GetTimeoutError

    monkeypatch.setattr("parcelray.cluster.worker_start._Echo.remote", Actor)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "kill", lambda actor: None)
    with pytest.raises(SystemFailure, match="did not answer within 90 s"):
        actor_round_trip()


def test_the_tracking_store_is_written_read_and_left_without_a_run(tmp_path: Path) -> None:
    uri = new_store(tmp_path)
    for _ in range(2):
        _is(services.check_tracking(uri, tmp_path), "pass", "mlflow.db")
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("parcelray-doctor")
    assert experiment is not None
    assert client.search_runs([experiment.experiment_id]) == []
    (tmp_path / "mlruns").mkdir()
    _is(services.check_tracking(uri, tmp_path), "warn", "mlflow migrate-filestore")


def test_a_store_that_does_not_work_is_reported(tmp_path: Path) -> None:
    _is(services.check_tracking(None), "skip")
    _is(services.check_tracking(f"sqlite:///{tmp_path}/new.db"), "skip", "the first run creates it")
    (tmp_path / "damaged.db").write_bytes(b"no database" * 500)
    _is(services.check_tracking(f"sqlite:///{tmp_path}/damaged.db"), "fail", "not a SQLite database")
    _is(services.check_tracking("file:///runs"), "fail", "mlflow migrate-filestore")
    _is(services.check_tracking("http://127.0.0.1:9"), "fail", "does not answer", "check that it runs")


def test_storage_is_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _is(services.check_storage(str(tmp_path / "runs")), "pass")
    assert list(tmp_path.iterdir()) == []
    _is(services.check_storage("memory://doctor/runs"), "pass")
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda self, path: b"other")
    _is(services.check_storage("memory://doctor/runs"), "fail", "other bytes")


@pytest.mark.parametrize(
    ("storage", "words"),
    [
        # Nobody can create a file there, not even root.
        ("/proc/runs", ["Error", "credentials"]),
        ("s9://bucket/runs", ["Protocol not known", "use a folder"]),
    ],
)
def test_storage_that_does_not_work_is_reported(storage: str, words: list[str]) -> None:
    _is(services.check_storage(storage), "fail", *words)


def test_storage_that_does_not_respond_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    end = threading.Event()

    def wait(uri: str) -> None:
        end.wait()
        raise OSError

    monkeypatch.setattr(services, "open_storage", wait)
    monkeypatch.setattr(services, "_STORAGE_LIMIT_S", 0.01)
    _is(services.check_storage("s3://bucket/runs"), "fail", "did not respond within 0.01 s", "credentials")
    end.set()


def test_the_cluster_is_queried_with_the_token(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _is(services.check_cluster(None), "skip")
    _is(services.check_cluster(server), "warn", "without a token", "RAY_AUTH_MODE=token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t0ken")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", server)
    _is(services.check_cluster(None), "pass", local_ray_version())
    monkeypatch.setattr(_Server, "token", "another")
    _is(services.check_cluster(server), "fail", "401", "RAY_AUTH_TOKEN")
    monkeypatch.setattr("parcelray.cluster.preflight.local_ray_version", lambda: "2.0.1")
    monkeypatch.setattr(_Server, "token", None)
    _is(services.check_cluster(server), "fail", "Ray 2.0.1", "install ray==")
    _is(services.check_cluster("http://127.0.0.1:9"), "fail", "Nothing responds", "check the address")
    _is(services.check_cluster("ray://head:10001"), "fail", "not the address of a Ray dashboard", "legal")


def test_the_hub_is_queried_for_the_models_of_the_job(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The environment of the tests switches the hub off.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    _is(services.check_hub(()), "skip", "nothing uses the hub")
    monkeypatch.setenv("HF_ENDPOINT", server)
    _is(services.check_hub(()), "pass", server)
    _is(services.check_hub(("org/model", "org/model@main")), "pass", "org/model@main")
    _is(services.check_hub(("org/none@main",)), "fail", "404", "HF_ENDPOINT")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    _is(services.check_hub(("org/model",)), "fail", "HF_HUB_OFFLINE=1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    _is(services.check_hub(("org/model",)), "skip")
