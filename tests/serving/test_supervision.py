"""Tests of what `parcelray serve` watches: its port, its signals, and the processes of its Ray."""

import io
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import pytest
from rich.console import Console

from parcelray.config.serve import HttpConfig
from parcelray.errors import UserError
from parcelray.serving import run, supervision
from parcelray.serving.plan import pin
from parcelray.serving.supervision import Signals, held_port, ray_watched
from tests.serving.local import PATIENCE_S, job_of, wait_until

pytestmark = pytest.mark.serving


@pytest.fixture
def http() -> HttpConfig:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return HttpConfig(port=free.getsockname()[1])


def _proxy(http: HttpConfig) -> socket.socket:
    """Returns a socket that listens as Serve's proxy does."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.settimeout(PATIENCE_S)
    listener.bind((http.host, http.port))
    listener.listen()
    return listener


def test_of_two_endpoints_on_one_port_the_second_is_refused(http: HttpConfig) -> None:
    """Also before the proxy of the first one listens, and with all connections for that proxy afterwards."""

    def refused() -> None:
        with (
            pytest.raises(UserError, match=f"port {http.port} of 127.0.0.1 .*another port with --port"),
            held_port(http),
        ):
            pass

    with held_port(http):
        refused()
        with _proxy(http) as listener:
            refused()
            for _ in range(50):
                with socket.create_connection((http.host, http.port), timeout=PATIENCE_S):
                    listener.accept()[0].close()
        refused()
    with _proxy(http):
        refused()
    with held_port(http):
        pass


@pytest.fixture
def received() -> tuple[Signals, list[int], io.StringIO]:
    ended: list[int] = []
    text = io.StringIO()
    return Signals(Console(file=text), ended.append), ended, text


def test_the_first_signal_stops_and_the_second_ends_the_process(received: Any) -> None:
    signals, ended, text = received
    signals.received(signal.SIGHUP)
    signals.received(signal.SIGCHLD)
    assert (signals.reload.is_set(), signals.stop.is_set(), text.getvalue()) == (True, False, "")
    signals.received(signal.SIGTERM)
    assert (signals.stop.is_set(), signals.exit_code, ended) == (True, 143, [])
    assert text.getvalue() == "Stopping before the endpoint answers\n"
    signals.received(signal.SIGINT)
    assert ended == [130]
    assert text.getvalue().endswith("Ended at once; requests in flight are lost\n")


def test_an_exception_that_is_earlier_than_the_number_of_its_signal_has_the_exit_code_of_the_signal(
    received: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals, _, text = received
    late = threading.Timer(0.2, signals.received, [signal.SIGTERM])

    @contextmanager
    def starting(*_: object, **__: object) -> Iterator[str]:
        late.start()
        # Ray's own handler exits with the number of the signal.
        raise SystemExit(int(signal.SIGTERM))
        yield

    monkeypatch.setattr(run, "signals", lambda console: nullcontext(signals))
    monkeypatch.setattr(run, "endpoint", starting)
    monkeypatch.setattr(run, "_SIGNAL_S", PATIENCE_S)
    with pytest.raises(SystemExit) as ended:
        run.run_endpoint(pin(job_of()), Console(file=text))
    assert ended.value.code == 128 + signal.SIGTERM
    late.join()


_STUCK = """
import ctypes
from rich.console import Console
from parcelray.serving.supervision import signals

with signals(Console()) as received:
    received.answers()
    lock, library = ctypes.create_string_buffer(256), ctypes.CDLL(None)
    library.pthread_mutex_lock(lock)
    print("locked", flush=True)
    library.pthread_mutex_lock(lock)
"""


def test_signals_are_received_while_the_main_thread_is_in_a_call_that_never_returns() -> None:
    """As calls into a Ray whose raylet died: Python's own handlers would never run."""
    with subprocess.Popen([sys.executable, "-c", _STUCK], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline().startswith("Stopping: finishing requests in flight")
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 128 + signal.SIGTERM


def test_a_dead_process_of_ray_ends_the_endpoint_with_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    died: list[str | None] = [None]
    text = io.StringIO()
    monkeypatch.setattr(supervision, "_PERIOD_S", 0.01)
    monkeypatch.setattr(supervision, "dead_process", lambda: died[0])
    monkeypatch.setattr(supervision, "end_now", ended.append)
    with ExitStack() as watched:
        watched.enter_context(ray_watched(Console(file=text)))
        assert not ended
        died[0] = "raylet"
        wait_until(lambda: ended)
    assert ended[0] == 1
    assert text.getvalue().splitlines()[0] == (
        "failed: Ray's process raylet died, so the endpoint cannot answer; start it again."
    )
