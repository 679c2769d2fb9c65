"""The proxy middleware, in front of an application that behaves and fails like Serve's proxy."""

import asyncio
import http.client
import json
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from starlette.types import Receive, Scope, Send

from parcelray.config.serve import RequestLimits
from parcelray.serving.http.api_errors import ApiError
from parcelray.serving.http.proxy_guard import (
    LIMITS_VARIABLE,
    BodyReader,
    ProxyGuard,
    middlewares,
    proxy_environment,
    request_id_of,
)
from tests.serving.http.test_api import post
from tests.serving.local import PATIENCE_S, serving

pytestmark = pytest.mark.serving


async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
    """Refuses in plain text, and otherwise answers with the headers and body size that it received."""
    message = await receive()
    if scope["path"] == "/defect":
        raise RuntimeError("an internal secret")
    if scope["path"] == "/nothing":
        return
    if scope["path"].startswith("/broken/"):
        kind = scope["path"][8:].replace("-", "/", 1).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        return
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"retry-after", b"7"),
        (b"x-request-id", b"the proxy's"),
    ]
    if scope["path"].startswith("/refuse/"):
        await send({"type": "http.response.start", "status": int(scope["path"][8:]), "headers": headers})
        await send({"type": "http.response.body", "body": b"deployment Ingress at 10.0.0.1"})
        return
    names = sorted(name.decode() for name, _ in scope["headers"])
    body = json.dumps({"id": request_id_of(scope), "names": names, "size": len(message["body"])}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": body})


@contextmanager
def guarded(**limits: Any) -> Iterator[str]:
    with serving(ProxyGuard(proxy, RequestLimits(**limits))) as url:
        yield url


def connected(url: str) -> socket.socket:
    address = urlsplit(url)
    return socket.create_connection((address.hostname, address.port), timeout=PATIENCE_S)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with guarded(body_mb=1, body_timeout_s=PATIENCE_S) as url:
        yield url


def test_the_application_and_the_client_get_our_request_id(url: str) -> None:
    _, headers, data = post(
        url, b"{}", {"x-request-id": "mine", "x-session-id": "s", "x-request-disconnect-disabled": "?1", "x-other": "1"}
    )
    assert headers["x-request-id"] == data["id"] != "mine"
    assert not {"x-session-id", "x-request-disconnect-disabled"} & set(data["names"])
    assert data["names"].count("x-request-id") == 1
    assert "x-other" in data["names"]


@pytest.mark.parametrize(
    ("status", "answered", "code"),
    [
        # The proxy has no route while the endpoint starts or stops. Clients and load balancers take a 404 as final.
        (404, 503, "not_ready"),
        (408, 408, "deadline_exceeded"),
        (429, 429, "queue_full"),
        (503, 503, "no_replica"),
        (500, 500, "internal_error"),
    ],
)
def test_errors_of_the_proxy_have_the_format_of_all_errors(url: str, status: int, answered: int, code: str) -> None:
    got, headers, data = post(url, b"{}", path=f"/refuse/{status}")
    assert (got, data["error"]["code"], set(data["error"])) == (answered, code, {"message", "type", "param", "code"})
    assert "10.0.0.1" not in data["error"]["message"]
    assert headers["x-request-id"].startswith("chatcmpl-")
    assert headers.get("retry-after") == ("7" if answered in (429, 503) else None)


def test_a_failure_of_the_proxy_is_a_500(url: str) -> None:
    status, _, data = post(url, b"{}", path="/defect")
    assert (status, data["error"]["message"]) == (500, "The server failed on this request.")


def test_a_request_whose_ingress_died_is_a_503_or_ends_with_an_error_event(url: str) -> None:
    """Serve's proxy sends nothing more when the ingress dies: no status, or no end of a started stream."""
    status, headers, data = post(url, b"{}", path="/nothing")
    assert (status, data["error"]["code"], headers["retry-after"]) == (503, "no_replica", "1")
    with connected(url) as connection:
        connection.sendall(b"POST /broken/text-event-stream HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n")
        response = http.client.HTTPResponse(connection)
        response.begin()
        first, error, end = response.read().decode().split("\n\n")
    assert (response.status, first, end) == (200, "data: 1", "")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "no_replica"
    # The client of another kind of answer must see that it is not complete.
    with connected(url) as connection:
        connection.sendall(b"POST /broken/application-json HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n")
        response = http.client.HTTPResponse(connection)
        response.begin()
        with pytest.raises(http.client.IncompleteRead):
            response.read()


@pytest.mark.parametrize("path", ["/-/routes", "/%2d/routes", "/-/%72outes"])
def test_the_list_of_applications_is_hidden(url: str, path: str) -> None:
    assert post(url, b"", path=path)[0] == 404


def test_a_body_is_forwarded_whole_or_refused(url: str) -> None:
    assert post(url, bytes(1024**2))[2]["size"] == 1024**2
    assert post(url, bytes(1024**2 + 1))[0] == 413
    with connected(url) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n")
        # A pause, so that the pieces arrive separately.
        time.sleep(0.1)
        connection.sendall(b"1\r\nb\r\n0\r\n\r\n")
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert (response.status, json.loads(response.read())["size"]) == (200, 2)


def test_a_body_that_does_not_arrive_is_a_408() -> None:
    with guarded(body_timeout_s=0.1) as url, connected(url) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\na")
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == 408


def test_the_limits_are_passed_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = proxy_environment(RequestLimits(body_mb=3, bodies_mb=30, body_timeout_s=4))
    monkeypatch.setenv(LIMITS_VARIABLE, environment[LIMITS_VARIABLE])
    (middleware,) = middlewares()
    limits: Any = middleware.kwargs["limits"]
    assert (limits.body_mb, limits.bodies_mb, limits.body_timeout_s) == (3, 30, 4)


async def _pieces(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def test_all_bodies_together_have_a_limit() -> None:
    limits = RequestLimits(body_mb=1, bodies_mb=2.5)
    bodies = BodyReader()
    whole = bytes(1024**2)

    async def run() -> None:
        async with (
            bodies.read(_pieces(whole), limits, None),
            bodies.read(_pieces(whole[:1000], whole[1000:]), limits, None),
        ):
            assert bodies.held_bytes == 2 * 1024**2
            with pytest.raises(ApiError) as refused:
                async with bodies.read(_pieces(whole[:1000], whole[1000:]), limits, None):
                    pass
            assert (refused.value.status, refused.value.headers["retry-after"]) == (429, "1")
            async with bodies.read(_pieces(whole[:1000]), limits, None) as small:
                assert len(small) == 1000
        assert bodies.held_bytes == 0

    asyncio.run(run())


def test_declared_bytes_do_not_count_as_held() -> None:
    limits = RequestLimits(body_mb=1, bodies_mb=1, body_timeout_s=0.2)
    bodies = BodyReader()

    async def slow() -> AsyncIterator[bytes]:
        yield b"a"
        await asyncio.Event().wait()

    async def run() -> None:
        async def declare() -> None:
            with pytest.raises(ApiError) as refused:
                async with bodies.read(slow(), limits, str(1024**2)):
                    pass
            assert refused.value.status == 408

        async def send() -> None:
            # Wait until each slow client has sent its first byte.
            while bodies.held_bytes < 50:
                await asyncio.sleep(0)
            async with bodies.read(_pieces(bytes(1024**2 - 100)), limits, None) as body:
                assert len(body) == 1024**2 - 100

        await asyncio.gather(*(declare() for _ in range(50)), send())
        assert bodies.held_bytes == 0

    asyncio.run(run())
