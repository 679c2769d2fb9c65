"""Tests that each request leaves one log record and one count, without its text."""

import itertools
import json
import logging
import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest

from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.serving.engine import continuous_engine
from parcelray.serving.engine.engine import EngineRefusal, Finished, GenerateRequest, Piece
from parcelray.serving.http.auth import add_key, read_keys
from parcelray.serving.ingress.clients import LocalClient
from tests.serving.http.test_api import post
from tests.serving.local import PATIENCE_S, VERSION, endpoint, wait_until

pytestmark = pytest.mark.serving
QUESTION = {"model": "mini", "messages": [{"role": "user", "content": "the secret question"}], "max_tokens": 4}


@pytest.fixture(autouse=True)
def _logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="parcelray.requests")


def records(caplog: pytest.LogCaptureFixture, count: int) -> list[dict[str, Any]]:
    """Returns the records once there are `count` of them."""

    def found() -> list[logging.LogRecord]:
        return [record for record in caplog.records if record.name == "parcelray.requests"]

    wait_until(lambda: len(found()) >= count)
    assert "secret" not in caplog.text
    return [record.__dict__["request"] for record in found()]


def test_the_log_holds_the_key_name_and_the_outcome(
    model: ElasticVLM, processor: ElasticProcessor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = add_key(tmp_path / "keys.txt", "ann")
    known = {"authorization": f"Bearer {key}"}
    with endpoint(model, processor, keys=read_keys(tmp_path / "keys.txt"), http={"keys_file": "keys.txt"}) as (
        url,
        service,
        _,
    ):
        _, headers, data = post(url, json.dumps(QUESTION).encode(), known)
        post(url, b"{", known)
        post(url, b"{}")
        answered, broken, unknown = records(caplog, 3)
    assert (answered["event"], answered["owner"], answered["id"], answered["model_version"]) == (
        "answered",
        "ann",
        data["id"],
        VERSION,
    )
    assert headers["x-request-id"] == data["id"]
    assert answered["new_tokens"] == data["usage"]["completion_tokens"]
    assert (broken["event"], broken["owner"], broken["status"], broken["code"]) == (
        "refused",
        "ann",
        400,
        "invalid_json",
    )
    assert (unknown["owner"], unknown["status"]) == (None, 401)
    assert key not in caplog.text
    assert b'parcel:requests_rejected_total{model_name="mini",reason="invalid_json"} 1.0' in service.metrics.text()


class _Breaks(LocalClient):
    """A client that yields one piece and then fails."""

    async def events(self, request: GenerateRequest) -> AsyncGenerator[Piece | Finished, None]:
        yield Piece("red")
        raise EngineRefusal("engine_error", "The replica failed on this request; send it again.")


def test_a_stream_that_breaks_off_is_logged_as_refused(
    model: ElasticVLM, processor: ElasticProcessor, caplog: pytest.LogCaptureFixture
) -> None:
    with endpoint(model, processor) as (url, service, engine):
        service.routes.champion.client = _Breaks(engine)
        assert post(url, json.dumps({**QUESTION, "stream": True}).encode())[0] == 200
        (record,) = records(caplog, 1)
    assert service.admission.in_flight == 0
    assert (record["event"], record["status"], record["code"]) == ("refused", 503, "engine_error")
    assert b'parcel:requests_rejected_total{model_name="mini",reason="engine_error"} 1.0' in service.metrics.text()


def streaming_connection(url: str) -> socket.socket:
    """Returns a connection on which a long stream was requested."""
    parts = urlsplit(url)
    body = json.dumps({**QUESTION, "stream": True, "max_tokens": 1000}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\ncontent-type:"
        " application/json\r\n"
    )
    connection = socket.create_connection((parts.hostname, parts.port), timeout=PATIENCE_S)
    connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    return connection


@pytest.fixture
def paused_answers(model: ElasticVLM, never_ending: None) -> Iterator[threading.Event]:
    """Pauses the model after its fourth forward pass until the event is set."""
    resume = threading.Event()
    tokens = itertools.count(1)
    hook = model.lm_head.register_forward_pre_hook(lambda *_: resume.wait() and None if next(tokens) > 4 else None)
    yield resume
    resume.set()
    hook.remove()


def test_a_disconnected_client_is_logged_as_cancelled(
    model: ElasticVLM, processor: ElasticProcessor, caplog: pytest.LogCaptureFixture, paused_answers: threading.Event
) -> None:
    with endpoint(model, processor) as (url, service, _):
        with streaming_connection(url) as connection:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        (record,) = records(caplog, 1)
        paused_answers.set()
    assert record["event"] == "cancelled"
    assert b'parcel:requests_rejected_total{model_name="mini",reason="cancelled"} 1.0' in service.metrics.text()


def test_a_deadline_during_an_answer_ends_its_stream(
    model: ElasticVLM,
    processor: ElasticProcessor,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    paused_answers: threading.Event,
) -> None:
    late_s = [0.0]
    monkeypatch.setattr(
        continuous_engine, "time", SimpleNamespace(perf_counter=lambda: time.perf_counter() + late_s[0])
    )
    with endpoint(model, processor) as (url, service, engine):
        with streaming_connection(url) as connection:
            received = b""
            while received.count(b"data: ") <= 2:
                received += connection.recv(65536)
            late_s[0] = PATIENCE_S
            paused_answers.set()
            received += b"".join(iter(lambda: connection.recv(65536), b""))
        (record,) = records(caplog, 1)
        assert engine.stats().kv_tokens_used == 0
    assert service.admission.in_flight == 0
    assert received.startswith(b"HTTP/1.1 200")
    assert b'"code":"deadline_exceeded"' in received
    assert b"[DONE]" not in received
    assert (record["event"], record["code"]) == ("refused", "deadline_exceeded")
