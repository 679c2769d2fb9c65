"""Tests of the processes of a local Ray, with a node that only exists in the test."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from parcelray.cluster.local_ray import dead_process, kill_local_ray

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


class Node:
    """The processes that this driver started, of which some are dead."""

    def __init__(self, session: Path, *dead: str, processes: tuple[str, ...] = ("raylet", "gcs_server")) -> None:
        self.all_processes = dict.fromkeys(processes)
        self.killed: list[dict[str, bool]] = []
        self._session = session
        self._dead = dead

    def dead_processes(self) -> list[tuple[str, object]]:
        return [(name, object()) for name in self._dead]

    def get_session_dir_path(self) -> str:
        return str(self._session)

    def kill_all_processes(self, **how: bool) -> None:
        self.killed.append(how)


@pytest.mark.parametrize(
    ("dead", "found"),
    [((), None), (("raylet",), "raylet"), (("log_monitor", "gcs_server"), "gcs_server"), (("dashboard",), None)],
)
def test_only_processes_without_which_ray_does_not_work_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dead: tuple[str, ...], found: str | None
) -> None:
    monkeypatch.setattr(ray._private.worker, "_global_node", Node(tmp_path, *dead))
    assert dead_process() == found
    monkeypatch.setattr(ray._private.worker, "_global_node", None)
    assert dead_process() is None


@pytest.mark.parametrize(("alive", "found"), [(True, None), (False, "raylet")])
def test_of_a_joined_cluster_the_raylet_of_this_node_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, alive: bool, found: str | None
) -> None:
    nodes: list[dict[str, Any]] = [{"NodeID": "other", "Alive": False}, {"NodeID": "here", "Alive": alive}]
    monkeypatch.setattr(ray._private.worker, "_global_node", Node(tmp_path, processes=()))
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "here"))
    assert dead_process() == found


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Starts a process whose output is in the folder of a session, and one whose output is in another's."""
    started = []
    for name in ("session", "session_other"):
        (tmp_path / name).mkdir()
        with (tmp_path / name / "worker.err").open("wb") as log:
            started.append(subprocess.Popen(SLEEP, stderr=log))
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_the_workers_of_this_session_are_killed_and_no_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, workers: list["subprocess.Popen[bytes]"]
) -> None:
    joined = Node(tmp_path / "session", processes=())
    monkeypatch.setattr(ray._private.worker, "_global_node", joined)
    kill_local_ray()
    assert (joined.killed, workers[0].poll()) == ([], None), "a joined cluster is not this driver's"
    node = Node(tmp_path / "session")
    monkeypatch.setattr(ray._private.worker, "_global_node", node)
    kill_local_ray()
    assert workers[0].wait(60) == -signal.SIGKILL
    assert workers[1].poll() is None
    assert node.killed == [{"check_alive": False, "allow_graceful": False}]
