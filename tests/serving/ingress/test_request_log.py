"""Each request leaves one record, however it ended, and a count; neither holds what was asked."""

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
    """The first records, once there are so many."""

    def found() -> list[logging.LogRecord]:
        return [record for record in caplog.records if record.name == "parcelray.requests"]

    wait_until(lambda: len(found()) >= count)
    assert "secret" not in caplog.text
    return [record.__dict__["request"] for record in found()]


def test_who_asked_and_how_it_ended(
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
    """Gives a piece, and then gives up."""

    async def events(self, request: GenerateRequest) -> AsyncGenerator[Piece | Finished, None]:
        yield Piece("red")
        raise EngineRefusal("engine_error", "The replica failed on this request; send it again.")


def test_a_stream_that_breaks_is_refused_in_the_log_too(
    model: ElasticVLM, processor: ElasticProcessor, caplog: pytest.LogCaptureFixture
) -> None:
    with endpoint(model, processor) as (url, service, engine):
        service.routes.champion.client = _Breaks(engine)
        assert post(url, json.dumps({**QUESTION, "stream": True}).encode())[0] == 200
        (record,) = records(caplog, 1)
    assert service.admission.in_flight == 0
    assert (record["event"], record["status"], record["code"]) == ("refused", 503, "engine_error")
    assert b'parcel:requests_rejected_total{model_name="mini",reason="engine_error"} 1.0' in service.metrics.text()


def asking(url: str) -> socket.socket:
    """A connection on which a long stream was asked for."""
    place = urlsplit(url)
    body = json.dumps({**QUESTION, "stream": True, "max_tokens": 1000}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\ncontent-type:"
        " application/json\r\n"
    )
    connection = socket.create_connection((place.hostname, place.port), timeout=PATIENCE_S)
    connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    return connection


@pytest.fixture
def in_the_middle(model: ElasticVLM, never_ending: None) -> Iterator[threading.Event]:
    """Keeps every answer after its fourth token until the event is set."""
    go_on = threading.Event()
    tokens = itertools.count(1)
    hook = model.lm_head.register_forward_pre_hook(lambda *_: go_on.wait() and None if next(tokens) > 4 else None)
    yield go_on
    go_on.set()
    hook.remove()


def test_who_hangs_up_is_in_the_log(
    model: ElasticVLM, processor: ElasticProcessor, caplog: pytest.LogCaptureFixture, in_the_middle: threading.Event
) -> None:
    with endpoint(model, processor) as (url, service, _):
        with asking(url) as connection:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        (record,) = records(caplog, 1)
        in_the_middle.set()
    assert record["event"] == "cancelled"
    assert b'parcel:requests_rejected_total{model_name="mini",reason="cancelled"} 1.0' in service.metrics.text()


def test_a_deadline_in_the_middle_of_an_answer_ends_its_stream(
    model: ElasticVLM,
    processor: ElasticProcessor,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    in_the_middle: threading.Event,
) -> None:
    late_s = [0.0]
    monkeypatch.setattr(
        continuous_engine, "time", SimpleNamespace(perf_counter=lambda: time.perf_counter() + late_s[0])
    )
    with endpoint(model, processor) as (url, service, engine):
        with asking(url) as connection:
            said = b""
            while said.count(b"data: ") <= 2:
                said += connection.recv(65536)
            late_s[0] = PATIENCE_S
            in_the_middle.set()
            said += b"".join(iter(lambda: connection.recv(65536), b""))
        (record,) = records(caplog, 1)
        assert engine.stats().kv_tokens_used == 0
    assert service.admission.in_flight == 0
    assert said.startswith(b"HTTP/1.1 200")
    assert b'"code":"deadline_exceeded"' in said
    assert b"[DONE]" not in said
    assert (record["event"], record["code"]) == ("refused", "deadline_exceeded")
