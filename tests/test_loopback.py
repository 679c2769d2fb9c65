"""Requests to this machine do not go to a proxy, whichever HTTP client sends them, and their tokens stay here."""

import contextlib
import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import requests

from parcelray.cluster.preflight import cluster_version
from parcelray.errors import ParcelrayError
from parcelray.loopback import bypass_proxies_on_loopback, is_loopback

VARIABLES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


class _Server(HTTPServer):
    """Answers every request like the dashboard of Ray, and records the requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, _Server)
        self.server.requests.append(f"{self.path} {self.headers.get('Authorization')}")
        body = b'{"ray_version": "1.2.3", "version": "4", "ray_commit": "x", "experiments": []}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def _running() -> Iterator[_Server]:
    server = _Server()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def target() -> Iterator[_Server]:
    """The service of this machine that is meant."""
    with _running() as server:
        yield server


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    """A proxy that the environment names for every host."""
    with _running() as server:
        for name in VARIABLES:
            monkeypatch.setenv(name, server.url)
        for name in ("no_proxy", "NO_PROXY"):
            # Set first, so that monkeypatch restores what a test changes.
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        yield server


def _with_requests(url: str) -> None:
    bypass_proxies_on_loopback()
    requests.get(url, timeout=5)


def _with_urllib(url: str) -> None:
    bypass_proxies_on_loopback()
    urllib.request.urlopen(url, timeout=5).close()


def _jobs_client(url: str) -> None:
    from parcelray.cluster.jobs import open_client

    open_client(url, "secret")


def _mlflow(url: str) -> None:
    from mlflow import MlflowClient

    from parcelray.tracking.store import ensure_store

    MlflowClient(tracking_uri=ensure_store(url)).search_experiments()


def _mlflow_logger(url: str) -> None:
    from parcelray.tracking.mlflow_tracker import MlflowRunLogger

    logger = MlflowRunLogger(url, "run")
    logger.log_metrics({"train/loss": 0.5}, 1)
    logger.flush()


@pytest.mark.parametrize(
    "send",
    [
        lambda url: cluster_version(url, "secret"),
        _with_requests,
        _with_urllib,
        _jobs_client,
        _mlflow,
        _mlflow_logger,
    ],
    ids=["preflight", "requests", "urllib", "Ray jobs", "MLflow", "MLflow logger"],
)
def test_no_client_sends_a_request_to_this_machine_to_a_proxy(
    send: Callable[[str], object], proxy: _Server, target: _Server
) -> None:
    # What the answer means to each client does not matter here.
    with contextlib.suppress(ParcelrayError, requests.RequestException, RuntimeError, KeyError):
        send(target.url)
    assert proxy.requests == []
    assert target.requests


def test_without_the_exemption_a_client_sends_it_to_the_proxy(proxy: _Server, target: _Server) -> None:
    requests.get(target.url, timeout=5)
    assert len(proxy.requests) == 1
    assert target.requests == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, "localhost,127.0.0.1,127.0.0.0/8,::1"),
        ({"no_proxy": "corp.example, 127.0.0.1"}, "corp.example,127.0.0.1,localhost,127.0.0.0/8,::1"),
        ({"NO_PROXY": "corp.example"}, "corp.example,localhost,127.0.0.1,127.0.0.0/8,::1"),
    ],
)
def test_hosts_that_were_exempted_stay_so(
    before: dict[str, str], after: str, proxy: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    for _ in range(2):
        bypass_proxies_on_loopback()
        assert (os.environ["no_proxy"], os.environ["NO_PROXY"]) == (after, after)
    monkeypatch.setenv("no_proxy", "*")
    bypass_proxies_on_loopback()
    assert os.environ["no_proxy"] == "*"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("LOCALHOST", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("[::1]", True),
        ("10.0.0.1", False),
        ("head", False),
        ("localhost.example.com", False),
        ("", False),
    ],
)
def test_loopback_hosts_are_recognised(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_a_command_and_its_children_have_the_exemption(proxy: _Server) -> None:
    code = "import sys, os; sys.argv = ['parcelray', '--version']; import parcelray.cli as cli, atexit\n" + (
        "atexit.register(lambda: print(os.environ['no_proxy']))\ncli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].startswith("localhost,127.0.0.1")
