"""Middleware in the process of Ray Serve's HTTP proxy, and the reading of request bodies within limits.

Serve's proxy has six problems:
- It applies headers of clients: request id, session, timeout, and whether a disconnect cancels the request.
- It fails on some headers that are not UTF-8.
- It lists its applications to every client.
- It forwards a body piece by piece, so a slow client occupies a slot of the ingress.
- It answers 404 while the endpoint starts or stops, which clients and load balancers take as final.
- It sends nothing when the ingress dies: no status, or a stream that breaks off without an error.

This middleware drops such headers, gives each request its own id, reads the whole body within limits, gives the proxy's
own errors the format of all errors, and ends the requests of a dead ingress with an error. Serve accepts middleware
only through an environment variable of the proxy's process; see `proxy_environment`.
"""

import asyncio
import json
import logging
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from parcelray.config.serve import RequestLimits
from parcelray.serving.http.api_errors import ApiError, too_many

logger = logging.getLogger("ray.serve")
CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
LIMITS_VARIABLE = "PARCELRAY_PROXY_LIMITS"
CALLBACK = f"{__name__}:middlewares"
_SCOPE_KEY = "parcelray.request_id"
"""Key of the request id in the ASGI scope, which reaches the ingress. Headers of clients cannot write it."""
_DROPPED = frozenset(
    {
        b"x-request-id",
        b"x-session-id",
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
        b"serve-multiplexed-model-id",
    }
)
_HIDDEN = "/-/routes"
_PROXY_ERRORS = {
    # The proxy has no route: the endpoint answers every path itself while it runs.
    404: (503, "The endpoint is starting or stopping; retry later.", "not_ready"),
    408: (408, "The request took too long; retry later.", "deadline_exceeded"),
    429: (429, "The endpoint has reached its limit of requests; retry later.", "queue_full"),
    503: (503, "No replica of the endpoint is available; retry later.", "no_replica"),
}
"""Status of the proxy -> status, message and code that the client gets."""
_MIB = 1024**2
_CLOSE = {"connection": "close"}
"""Closes the connection: the rest of a refused body is not read, so the connection cannot be reused."""
_FAILED = (500, "The server failed on this request.", "internal_error")


def proxy_environment(limits: RequestLimits) -> dict[str, str]:
    """Returns the environment variables that install this middleware in a process of Serve's proxy."""
    return {
        CALLBACK_VARIABLE: CALLBACK,
        LIMITS_VARIABLE: limits.model_dump_json(include={"body_mb", "body_timeout_s", "bodies_mb"}),
    }


def middlewares() -> list[Middleware]:
    """Returns the middleware; called by Serve's proxy when it starts."""
    return [Middleware(ProxyGuard, limits=RequestLimits.model_validate_json(os.environ.get(LIMITS_VARIABLE, "{}")))]


def request_id_of(scope: Scope) -> str:
    """Returns the id that the proxy gave to a request; a new id if the request did not pass the proxy."""
    return str(scope.get(_SCOPE_KEY) or _new_id())


class BodyReader:
    """Reads request bodies within limits of size, time, and the memory of all bodies in this process."""

    def __init__(self) -> None:
        self.held_bytes = 0

    @asynccontextmanager
    async def read(
        self, pieces: AsyncIterator[bytes], limits: RequestLimits, declared: str | None
    ) -> AsyncIterator[bytes]:
        """Reads a whole body, which counts as held in memory until the context is left.

        Args:
            pieces: pieces of the body as they arrive.
            limits: limits of one body, and of all bodies together.
            declared: value of the header Content-Length.

        Raises:
            ApiError: 413 for too many bytes, 408 after the time limit, 429 at the memory limit of all bodies.
        """
        longest = int(limits.body_mb * _MIB)
        too_large = ApiError(
            413, f"The body is larger than {limits.body_mb:g} MiB.", code="body_too_large", headers=_CLOSE
        )
        if declared is not None and declared.isdecimal() and int(declared[:20]) > longest:
            raise too_large
        body = bytearray()
        try:
            try:
                async with asyncio.timeout(limits.body_timeout_s):
                    async for piece in pieces:
                        if len(body) + len(piece) > longest:
                            raise too_large
                        # Only received bytes count. If declared bytes counted, a few slow clients could take all the
                        # memory.
                        self._check(len(piece), limits)
                        self.held_bytes += len(piece)
                        body += piece
            except TimeoutError:
                message = f"The body did not arrive within {limits.body_timeout_s:g} s; retry on a faster connection."
                raise ApiError(408, message, code="body_timeout", headers=_CLOSE) from None
            yield bytes(body)
        finally:
            self.held_bytes -= len(body)

    def _check(self, size: int, limits: RequestLimits) -> None:
        if self.held_bytes + size > limits.bodies_mb * _MIB:
            refusal = too_many(
                "The memory limit for the bodies of all requests is reached; retry later.",
                code="queue_full",
                retry_after_s=1,
            )
            refusal.headers |= _CLOSE
            raise refusal


class ProxyGuard:
    """The ASGI middleware; see the module's docstring.

    Args:
        app: Serve's proxy.
        limits: limits of bodies.
    """

    def __init__(self, app: ASGIApp, limits: RequestLimits) -> None:
        self._app = app
        self._limits = limits
        self._bodies = BodyReader()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] == "websocket":
            # Websockets are not supported. Closing before the handshake gives a 403.
            await send({"type": "websocket.close", "code": 1008})
            return
        request_id = _new_id()
        answer = _Answer(send, request_id)
        try:
            await self._forward(scope, receive, answer, request_id)
        except ClientDisconnect:
            return
        except ApiError as error:
            await answer.refuse(error)
        except Exception:
            logger.exception("request %s failed in the proxy", request_id)
            await answer.break_off(_proxy_error(500))
        if not answer.ended:
            logger.warning("request %s was lost with its ingress", request_id)
            message = "The process that handled this request was lost; retry the request."
            await answer.break_off(ApiError(503, message, code="no_replica", headers={"retry-after": "1"}))

    async def _forward(self, scope: Scope, receive: Receive, answer: "_Answer", request_id: str) -> None:
        if scope["path"].removeprefix(scope.get("root_path", "")) == _HIDDEN:
            raise ApiError(404, "There is nothing at this path.", code="not_found")
        request = Request(scope, receive)
        headers = [*_without_dropped(scope["headers"]), (b"x-request-id", request_id.encode())]
        async with answer.held as held:
            body = await held.enter_async_context(
                self._bodies.read(request.stream(), self._limits, request.headers.get("content-length"))
            )
            replay = _Replay(body, receive, answer)
            await self._app({**scope, "headers": headers, _SCOPE_KEY: request_id}, replay, answer.send)


class _Replay:
    """The `receive` callable of a request whose body has been read."""

    def __init__(self, body: bytes, receive: Receive, answer: "_Answer") -> None:
        self._body: bytes | None = body
        self._receive = receive
        self._answer = answer

    async def __call__(self) -> Message:
        if self._body is None:
            message = await self._receive()
            # Nobody waits for the answer of a client that disconnected.
            self._answer.ended |= message["type"] == "http.disconnect"
            return message
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


class _Answer:
    """The `send` callable of a request: adds the request id, and converts the proxy's own errors into our format.

    The body counts as held until the response starts, because the request may wait in the proxy until then.
    """

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id.encode()
        self._started = self._is_event_stream = False
        self.ended = False
        """Whether the whole answer was sent, or its client is gone."""
        self.held = AsyncExitStack()

    async def send(self, message: Message) -> None:
        if message["type"] != "http.response.start":
            if not self.ended:
                self.ended = not message.get("more_body", False)
                await self._send(message)
            return
        await self.held.aclose()
        headers = {bytes(name).lower(): bytes(value) for name, value in message["headers"]}
        # Errors of the endpoint are JSON; errors in plain text come from the proxy.
        if message["status"] >= 400 and headers.get(b"content-type", b"").startswith(b"text/plain"):
            await self.refuse(_proxy_error(message["status"], headers.get(b"retry-after", b"1").decode("latin-1")))
            return
        self._is_event_stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        await self._start(message["status"], message["headers"])

    async def refuse(self, error: ApiError) -> None:
        """Answers with an error, unless an answer has started."""
        if self._started:
            return
        body = _encoded(error)
        headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
        await self._start(error.status, [(name.encode(), value.encode()) for name, value in headers.items()])
        await self.send({"type": "http.response.body", "body": body})

    async def break_off(self, error: ApiError) -> None:
        """Ends an answer that will not be completed: with an error, or with an error event in a started stream.

        A started answer that is no stream is left incomplete, so the server closes the connection.
        """
        await self.refuse(error)
        if self._is_event_stream:
            await self.send({"type": "http.response.body", "body": b"data: " + _encoded(error) + b"\n\n"})
        self.ended = True

    async def _start(self, status: int, headers: Any) -> None:
        self._started = True
        kept = [(name, value) for name, value in headers if bytes(name).lower() != b"x-request-id"]
        await self._send(
            {"type": "http.response.start", "status": status, "headers": [*kept, (b"x-request-id", self._request_id)]}
        )


def _new_id() -> str:
    return f"chatcmpl-{secrets.token_hex(12)}"


def _without_dropped(headers: Any) -> list[tuple[bytes, bytes]]:
    """Returns the headers without those that Serve's proxy applies or cannot decode.

    The proxy decodes the name of every header, and the value of `traceparent`, as UTF-8.
    """
    return [
        (name, value)
        for name, value in headers
        if name.isascii()
        and name.lower().replace(b"_", b"-") not in _DROPPED
        and (name != b"traceparent" or value.isascii())
    ]


def _encoded(error: ApiError) -> bytes:
    return json.dumps(error.body(), separators=(",", ":")).encode()


def _proxy_error(status: int, retry_after: str = "1") -> ApiError:
    answered, message, code = _PROXY_ERRORS.get(status, _FAILED)
    headers = {"retry-after": retry_after} if answered in (429, 503) else None
    return ApiError(answered, message, code=code, headers=headers)
