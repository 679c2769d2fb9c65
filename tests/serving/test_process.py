"""Tests `parcelray serve` as a separate process: answers, signals, a port that is held, and the death of its raylet."""

import base64
import contextlib
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from openai import AuthenticationError, OpenAI
from rich.console import Console

from parcelray.config.train import TrainJob
from parcelray.serving.http.auth import add_key, remove_key
from parcelray.training.run import run_training
from tests.datasets.conversation_data import names_of, rows_of, write_folder
from tests.processes import own_ray
from tests.serving.local import PATIENCE_S, wait_until
from tests.training.conftest import TINY

pytestmark = [pytest.mark.serving, pytest.mark.ray, pytest.mark.slow]


class Process:
    """A running command and its printed lines."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        command = [sys.executable, "-m", "parcelray.cli", "serve", *arguments]
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**own_ray(), "COLUMNS": "200"},
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=lambda: self.lines.extend(iter(self._read, "")), daemon=True)
        self._reader.start()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def wait_for(self, text: str) -> None:
        def found() -> bool:
            assert self._process.poll() is None, self.lines
            return any(text in line for line in self.lines)

        wait_until(found, self.lines)

    @property
    def pid(self) -> int:
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> int:
        code = self._process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return code

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            self.end()


@contextmanager
def serving(arguments: list[str], folder: Path) -> Iterator[Process]:
    process = Process(arguments, folder)
    try:
        yield process
    finally:
        process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.nightly
@pytest.mark.parametrize("layout", ["folder", "object storage"])
def test_a_model_trained_on_own_data_is_served_from_its_storage(
    tmp_path: Path, tiny_start: dict[str, Any], s3: str, layout: str
) -> None:
    storage = str(tmp_path / "runs") if layout == "folder" else s3
    data = {"type": "conversations", "images": str(tmp_path / "images"), "held_out": {"validation": 0.2}}
    data["path"] = str(write_folder(tmp_path, 16))
    job = TrainJob.model_validate(TINY | {"model": tiny_start, "data": data, "storage": storage})
    run_training(job, Console(file=io.StringIO()))
    port = free_port()
    arguments = [f"{storage}/train/tiny/model", "--port", str(port), "--set", "tracking.uri=null"]
    with serving([*arguments, "--set", f"limits.timeout_s={PATIENCE_S}"], tmp_path) as process:
        process.wait_for(f"answers at http://127.0.0.1:{port}/v1")
        image = base64.b64encode((tmp_path / "images" / names_of(rows_of(1)[0])[0]).read_bytes()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
            {"type": "text", "text": "compare"},
        ]
        with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=PATIENCE_S) as client:
            (model,) = client.models.list().data
            for budget in (16, 64):
                messages: Any = [{"role": "user", "content": content}]
                answer = client.chat.completions.create(
                    model=model.id, messages=messages, max_tokens=4, extra_body={"visual_tokens": budget}
                )
                assert answer.usage is not None
                assert answer.usage.prompt_tokens > budget


def test_the_command_answers_reloads_on_sighup_and_drains_on_sigterm(tmp_path: Path, repo_root: Path) -> None:
    port = free_port()
    keys = {"ann": add_key(tmp_path / "keys.txt", "ann")}
    changes = (f"http.keys_file={tmp_path / 'keys.txt'}", "tracking.uri=null", f"limits.timeout_s={PATIENCE_S}")
    arguments = [str(repo_root / "jobs" / "serve" / "mini.yaml"), "--port", str(port)]
    arguments += [argument for change in changes for argument in ("--set", change)]
    with serving(arguments, tmp_path) as process:
        process.wait_for(f"mini answers at http://127.0.0.1:{port}/v1")

        def client(key: str) -> OpenAI:
            return OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0, timeout=PATIENCE_S)

        def knows(key: str) -> bool:
            try:
                return client(key).models.retrieve("mini").id == "mini"
            except AuthenticationError:
                return False

        assert knows(keys["ann"])
        # Changed keys take effect after SIGHUP.
        keys["bob"] = add_key(tmp_path / "keys.txt", "bob")
        remove_key(tmp_path / "keys.txt", "ann")
        assert not knows(keys["bob"])
        process.signal(signal.SIGHUP)
        process.wait_for("Now serving sha256:")
        wait_until(lambda: knows(keys["bob"]))
        assert not knows(keys["ann"])

        stream = client(keys["bob"]).chat.completions.create(
            model="mini",
            messages=[{"role": "user", "content": "how many"}],
            max_tokens=1000,
            temperature=2.0,
            seed=1,
            stream=True,
        )
        chunks = [next(stream)]
        process.signal(signal.SIGTERM)
        chunks += stream
        assert chunks[-1].choices[0].finish_reason in ("stop", "length")
        assert process.end() == 0
    assert any("Stopping: finishing requests in flight" in line for line in process.lines)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)


def _children(parent: int, text: str) -> list[int]:
    """Returns the child processes whose command line contains a text."""
    found = []
    for entry in Path("/proc").iterdir():
        # A process may end in between.
        with contextlib.suppress(OSError):
            if (
                entry.name.isdigit()
                and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent
                and text in (entry / "cmdline").read_text().replace("\0", " ")
            ):
                found.append(int(entry.name))
    return found


def _raylets(driver: int) -> list[int]:
    return _children(driver, "/raylet ")


@pytest.mark.nightly
def test_a_dead_raylet_ends_the_command_and_everything_that_it_started(tmp_path: Path, repo_root: Path) -> None:
    port = free_port()
    arguments = [str(repo_root / "jobs" / "serve" / "mini.yaml"), "--port", str(port), "--set", "tracking.uri=null"]
    with serving(arguments, tmp_path) as process:
        process.wait_for(f"mini answers at http://127.0.0.1:{port}/v1")
        # The port belongs to this endpoint.
        with serving(arguments, tmp_path) as second:
            assert second.end() == 2
        assert any("choose another port with --port" in line for line in second.lines), second.lines
        os.kill(_raylets(process.pid)[0], signal.SIGKILL)
        assert process.end() == 1
        assert any("Ray's process raylet died" in line for line in process.lines), process.lines
    # The proxy is a process of the dead raylet, and would hold the port for another minute.
    socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.nightly
def test_a_signal_during_the_start_ends_the_command_with_a_sentence(tmp_path: Path, repo_root: Path) -> None:
    arguments = [str(repo_root / "jobs" / "serve" / "mini.yaml"), "--port", str(free_port())]
    arguments += ["--set", "tracking.uri=null"]
    with serving(arguments, tmp_path) as process:
        process.wait_for("Starting sha256:")
        wait_until(lambda: _raylets(process.pid))
        process.signal(signal.SIGTERM)
        assert process.end() == 128 + signal.SIGTERM
    assert any("Stopping before the endpoint answers" in line for line in process.lines), process.lines


class Clients:
    """Closed-loop clients of an endpoint until the end of the context, every second of them with streaming."""

    def __init__(self, port: int, number: int = 6) -> None:
        self.outcomes: Counter[str] = Counter()
        self._port = port
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(bool(each % 2),)) for each in range(number)]

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, answers: int) -> None:
        wanted = self.outcomes["answered"] + answers
        wait_until(lambda: self.outcomes["answered"] >= wanted, self.outcomes)

    def _run(self, stream: bool) -> None:
        while not self._ended.is_set():
            outcome = self._ask(stream)
            self.outcomes[outcome] += 1
            if outcome != "answered":
                self._ended.wait(0.2)

    def _ask(self, stream: bool) -> str:
        fields = {"model": "mini", "max_tokens": 20, "temperature": 2.0, "stream": stream}
        body = json.dumps({**fields, "messages": [{"role": "user", "content": "how many"}]})
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE_S)
        try:
            connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
            response = connection.getresponse()
            text = response.read()
        except (OSError, http.client.HTTPException):
            return "connection lost"
        finally:
            connection.close()
        if response.status != 200:
            return str(response.status)
        if not stream or text.endswith(b"data: [DONE]\n\n"):
            return "answered"
        return "error event" if b'"error"' in text else "stream without an end"


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_clients_and_operator_learn_what_died_and_that_it_is_back(tmp_path: Path, repo_root: Path) -> None:
    port = free_port()
    changes = ("tracking.uri=null", "replicas={min: 2, max: 2, cpus: 0.5, threads: 1}")
    arguments = [str(repo_root / "jobs" / "serve" / "mini.yaml"), "--port", str(port)]
    arguments += [argument for change in changes for argument in ("--set", change)]
    found: dict[str, set[str]] = {}
    with serving(arguments, tmp_path) as process:
        process.wait_for(f"mini answers at http://127.0.0.1:{port}/v1")
        (raylet,) = _raylets(process.pid)
        for name, title in (("model replica", ":Model"), ("ingress", ":Ingress"), ("proxy", "ProxyActor")):
            with Clients(port) as clients:
                clients.wait_for(20)
                os.kill(_children(raylet, title)[0], signal.SIGKILL)
                process.wait_for(f"{name} died; replaced after")
                clients.wait_for(20)
            found[name] = set(clients.outcomes)
        with Clients(port) as clients:
            clients.wait_for(20)
            hung = _children(raylet, ":Model")[0]
            os.kill(hung, signal.SIGSTOP)
            process.wait_for("requests waited for a model replica that does not respond; retried.")
            clients.wait_for(20)
            os.kill(hung, signal.SIGCONT)
        found["hung replica"] = set(clients.outcomes)
        with Clients(port) as clients:
            clients.wait_for(20)
            process.signal(signal.SIGTERM)
            assert process.end() == 0
        found["stop"] = set(clients.outcomes)
    # An ingress or a proxy takes the requests in flight with it; each client gets an answer, and none that is final.
    assert found["model replica"] <= {"answered", "error event"}
    assert found["ingress"] <= {"answered", "error event", "503"}
    assert found["proxy"] <= {"answered", "connection lost", "503"}
    assert found["hung replica"] == {"answered"}
    assert found["stop"] <= {"answered", "503", "connection lost"}
