"""Tests of deploying, updating and stopping endpoints on a Serve that only exists in the test."""

import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from parcelray.errors import SystemFailure, UserError
from parcelray.serving.deployments import (
    RemoteCluster,
    application_names,
    deploy,
    endpoint_states,
    states_table,
    stop,
    update,
)
from parcelray.serving.http.auth import add_key
from parcelray.serving.plan import pin
from tests.serving.local import job_of

FOREIGN = {"name": "foreign", "import_path": "elsewhere:app", "route_prefix": "/foreign", "args": {}}


class FakeServe:
    """Serve, whose applications run as soon as they are deployed, unless their start fails."""

    poll_s = 0.0

    def __init__(self, port: int = 8000) -> None:
        self.applications: dict[str, dict[str, Any]] = {"foreign": FOREIGN}
        self.history: list[list[str]] = []
        self.broken: set[str] = set()
        self.waiting: dict[str, int] = {}
        """Number of queries for which an application waits for resources, by name."""
        self._port = port

    def apply(self, config: dict[str, Any]) -> None:
        self.applications = {app["name"]: app for app in config["applications"]}
        self.history.append(sorted(self.applications))

    def details(self) -> dict[str, Any]:
        return {
            "http_options": {"host": "127.0.0.1", "port": self._port},
            "proxies": {"node": {"node_ip": "10.0.0.1", "status": "HEALTHY"}},
            "applications": {name: self._application(app) for name, app in self.applications.items()},
        }

    def _application(self, app: dict[str, Any]) -> dict[str, Any]:
        replicas = [{"state": "RUNNING"}, {"state": "STARTING"}]
        left = self.waiting.get(app["name"], 0)
        if left:
            self.waiting[app["name"]] = left - 1
            deployments = {"Model": {"replicas": [], "target_num_replicas": 2, "message": "1 replica waits for 2 CPU"}}
            return {"status": "DEPLOYING", "message": "", "deployed_app_config": app, "deployments": deployments}
        return {
            "status": "DEPLOY_FAILED" if app["name"] in self.broken else "RUNNING",
            "message": "no memory" if app["name"] in self.broken else "",
            "deployed_app_config": app,
            "deployments": {"Model": {"replicas": replicas, "target_num_replicas": 2, "message": ""}},
        }


@pytest.fixture
def cluster() -> FakeServe:
    cluster = FakeServe()
    deploy(pin(job_of()), cluster, {"py_modules": ["gcs://package.zip"]})
    return cluster


def test_applications_of_others_are_kept_and_ours_get_the_runtime_environment(cluster: FakeServe) -> None:
    ingress, model = application_names(cluster.details(), "mini")
    assert cluster.history == [sorted(["foreign", "mini", model])]
    assert ingress == "mini"
    assert cluster.applications["foreign"] == FOREIGN
    assert cluster.applications[model]["runtime_env"] == {"py_modules": ["gcs://package.zip"]}


def test_an_update_starts_the_new_model_first_and_removes_the_old_one_last(cluster: FakeServe) -> None:
    _, old = application_names(cluster.details(), "mini")
    update(cluster, "mini", ["budgets.offered=[16, 64]"])
    _, new = application_names(cluster.details(), "mini")
    assert new != old
    everything = sorted(["foreign", "mini", old, new])
    assert cluster.history[1:] == [everything, everything, sorted(["foreign", "mini", new])]
    # The applications are built from the package that the endpoint was started with.
    assert cluster.applications[new]["runtime_env"] == {"py_modules": ["gcs://package.zip"]}


def test_a_model_that_cannot_start_leaves_the_old_one(cluster: FakeServe) -> None:
    before = dict(cluster.applications)
    (new,) = [app for app in _names(pin(job_of(budgets={"offered": [16]}))) if app != "mini"]
    cluster.broken.add(new)
    with pytest.raises(SystemFailure, match=f"cannot start {new}: no memory"):
        update(cluster, "mini", ["budgets.offered=[16]"])
    assert cluster.applications == before


def test_what_serve_waits_for_is_said_once(cluster: FakeServe) -> None:
    (new,) = [app for app in _names(pin(job_of(budgets={"offered": [16]}))) if app != "mini"]
    cluster.waiting[new] = 4
    lines: list[str] = []
    update(cluster, "mini", ["budgets.offered=[16]"], lines.append)
    assert lines == [f"Serve starts {new}: 1 replica waits for 2 CPU"]


def _names(pinned: Any) -> list[str]:
    return [app["name"] for app in pinned.config()["applications"]]


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("minni", "detached=true", r"minni is not an endpoint of this cluster \(legal: mini\)"),
        ("foreign", "detached=true", "foreign is not an endpoint"),
        ("mini", "http.port=9", "listens on 127.0.0.1:8000, not on 127.0.0.1:9"),
        ("mini", "name=other", "name is other, but the endpoint mini is updated"),
        ("mini", "budgets.offered=[17.5]", "the job of the endpoint mini"),
    ],
)
def test_an_update_that_is_not_possible_changes_nothing(
    cluster: FakeServe, name: str, override: str, message: str
) -> None:
    before = list(cluster.history)
    with pytest.raises(UserError, match=message):
        update(cluster, name, [override])
    assert cluster.history == before


def test_an_update_from_a_machine_without_the_keys_file_keeps_the_keys(tmp_path: Path) -> None:
    cluster, file = FakeServe(), tmp_path / "keys.txt"
    add_key(file, "ann")
    deploy(pin(job_of(http={"keys_file": str(file)})), cluster, {})
    before = cluster.applications["mini"]["deployments"]
    file.unlink()
    update(cluster, "mini", [])
    assert [key["name"] for key in before[0]["user_config"]["keys"]] == ["ann"]
    assert cluster.applications["mini"]["deployments"] == before


def test_a_stop_removes_the_ingress_before_its_model(cluster: FakeServe) -> None:
    _, model = application_names(cluster.details(), "mini")
    stop(cluster, "mini")
    assert cluster.history[1:] == [["foreign", model], ["foreign"]]
    with pytest.raises(UserError, match=r"mini is not an endpoint of this cluster \(there is none"):
        stop(cluster, "mini")


def test_the_state_of_an_endpoint_names_its_address_versions_and_replicas(cluster: FakeServe) -> None:
    (state,) = endpoint_states(cluster)
    version = pin(job_of()).champion.pinned
    assert state.to_dict() == {
        "name": "mini",
        "status": "RUNNING",
        "url": "http://127.0.0.1:8000",
        "proxies": ("proxy on 10.0.0.1: HEALTHY",),
        "models": {version: "1 of 2 replicas run"},
        "reducers": {},
        "message": "",
    }
    assert endpoint_states(cluster, "mini") == [state]


def test_a_version_is_shown_and_updated_with_its_reducer() -> None:
    cluster = FakeServe()
    deploy(pin(job_of(reducer={"type": "fastv", "layer": 1}, budgets={"offered": [100, 256]})), cluster, {})
    (state,) = endpoint_states(cluster)
    (version,) = state.models
    assert state.reducers == {version: {"type": "fastv", "layer": 1, "positions": "image"}}
    table = Console(file=io.StringIO(), width=200)
    table.print(states_table([state]))
    assert "1 of 2 replicas run, reducer fastv" in table.file.getvalue()  # type: ignore[attr-defined]
    _, old = application_names(cluster.details(), "mini")
    update(cluster, "mini", ["reducer={type: cluster_aggregate}"])
    _, new = application_names(cluster.details(), "mini")
    assert new != old, "another reducer is another application of the same version"
    assert endpoint_states(cluster)[0].reducers[version]["type"] == "cluster_aggregate"


@contextmanager
def _dashboard(serve: FakeServe, requests: list[tuple[str, str, str | None]]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(json.dumps(serve.details()).encode())

        def do_PUT(self) -> None:
            serve.apply(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self._answer(b"")

        def _answer(self, body: bytes) -> None:
            requests.append((self.command, self.path, self.headers["authorization"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_cluster_is_reached_through_its_dashboard_with_its_token(
    cluster: FakeServe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    monkeypatch.setattr(RemoteCluster, "poll_s", 0.0)
    requests: list[tuple[str, str, str | None]] = []
    with _dashboard(cluster, requests) as url:
        assert [state.name for state in endpoint_states(RemoteCluster(url))] == ["mini"]
        stop(RemoteCluster(url), "mini")
    assert list(cluster.applications) == ["foreign"]
    assert {method for method, _, _ in requests} == {"GET", "PUT"}
    assert {each[1:] for each in requests} == {("/api/serve/applications/", "Bearer secret")}
