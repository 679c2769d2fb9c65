"""The HTTP API as an ASGI application: OpenAI's chat completions, models, health, metrics and the playground.

It runs on Ray Serve (`ingress`), and without Ray in tests.
"""

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from parcelray import __version__
from parcelray.config.serve import LOOPBACK, HttpConfig
from parcelray.serving.engine.engine import Finished, Piece
from parcelray.serving.http import responses
from parcelray.serving.http.api_errors import ApiError
from parcelray.serving.http.auth import Gatekeeper
from parcelray.serving.http.playground import inspect_request, playground_routes
from parcelray.serving.http.proxy_guard import BodyReader, request_id_of
from parcelray.serving.http.schemas import openapi, parse_chat
from parcelray.serving.ingress.chat import ChatService, Prepared
from parcelray.serving.ingress.clients import Readiness
from parcelray.serving.ingress.request_log import RequestLog

logger = logging.getLogger(__name__)
_HOST = re.compile(r"(?P<name>\[[0-9a-fA-F:]+\]|[^:]*)(:\d+)?")
Handler = Callable[[Request], Awaitable[Response]]


@dataclass
class _StreamEnd:
    """The state of a stream at its end."""

    logged: bool = False
    """Whether the end of the stream is in the request log."""


class Api:
    """The HTTP handlers of one endpoint.

    Args:
        name: name of the model in requests.
        http: HTTP settings of the job.
        service: returns the service that answers chat requests; a function, because a rolling update replaces it.
        gatekeeper: checks API keys and their rate limits.
        log: request log, one record per request.
    """

    def __init__(
        self, name: str, http: HttpConfig, service: Callable[[], ChatService], gatekeeper: Gatekeeper, log: RequestLog
    ) -> None:
        self._name = name
        self._http = http
        self._service = service
        self._gatekeeper = gatekeeper
        self._log = log
        self._created = int(time.time())
        self._bodies = BodyReader()
        self._readiness = Readiness()

    def application(self) -> Starlette:
        """Returns the ASGI application with all routes."""
        routes = [
            Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
            Route("/v1/models", self._guarded(self._models)),
            Route("/v1/models/{model:path}", self._guarded(self._model)),
            Route("/version", self._guarded(self._version)),
            Route("/metrics", self._guarded(self._metrics)),
            Route("/openapi.json", self._guarded(self._openapi)),
            Route("/health", self._health),
            Route("/ready", self._open(self._ready)),
        ]
        if self._http.playground:
            routes += [
                *playground_routes(),
                Route("/playground/inspect", self._guarded(self._inspect), methods=["POST"]),
            ]
        return Starlette(routes=routes, exception_handlers={HTTPException: _http_error, Exception: _unexpected})

    def _open(self, handler: Handler) -> Handler:
        """Wraps a handler: adds a request id, checks the Host header, and converts errors into responses."""

        async def wrapped(request: Request) -> Response:
            # Our own id, not the client's, because ids of requests in flight must be unique.
            request.state.request_id = request_id_of(request.scope)
            request.state.owner = None
            try:
                self._check_host(request)
                response = await handler(request)
            except ApiError as error:
                self._refused(request, error)
                response = JSONResponse(error.body(), error.status, error.headers)
            except ClientDisconnect:
                self._cancelled(request)
                response = Response(status_code=499)
            except asyncio.CancelledError:
                # Serve's proxy cancels the request when the client disconnects.
                self._cancelled(request)
                raise
            # Serve's proxy adds this header to every request, and then to the response.
            if "x-request-id" not in request.headers:
                response.headers["x-request-id"] = request.state.request_id
            return response

        return wrapped

    def _guarded(self, handler: Handler) -> Handler:
        """Wraps a handler like `_open`, and checks the API key first."""

        async def admitted(request: Request) -> Response:
            request.state.owner = self._gatekeeper.admit(request.headers.get("authorization"))
            return await handler(request)

        return self._open(admitted)

    def _refused(self, request: Request, error: ApiError) -> None:
        self._service().metrics.rejected(error.code)
        self._log.refused(request.state.request_id, owner=request.state.owner, status=error.status, code=error.code)

    def _cancelled(self, request: Request) -> None:
        self._service().metrics.rejected("cancelled")
        self._log.cancelled(request.state.request_id, owner=request.state.owner)

    def _body(self, request: Request) -> AbstractAsyncContextManager[bytes]:
        """Reads the body of a request within its limits."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(
                415, f"The content type is {kind[:60]!r}; legal is application/json.", code="unsupported_content_type"
            )
        return self._bodies.read(request.stream(), self._service().limits, request.headers.get("content-length"))

    def _check_host(self, request: Request) -> None:
        """Without keys, refuses requests whose Host header is not the loopback.

        Otherwise a web page could reach the model through a host name that resolves to this machine (DNS rebinding).
        """
        if self._http.keys_file is not None:
            return
        match = _HOST.fullmatch(request.headers.get("host", ""))
        if match is None or match["name"].strip("[]") not in LOOPBACK:
            raise ApiError(
                403,
                f"The Host header is not one of {', '.join(sorted(LOOPBACK))}; without API keys this endpoint only"
                " serves its own machine.",
                code="host",
            )

    async def _chat(self, request: Request) -> Response:
        service = self._service()
        async with AsyncExitStack() as resources:
            # A slot is taken after the body has arrived, so that slow clients do not occupy one.
            body = await resources.enter_async_context(self._body(request))
            # The time starts here, so that slow sending by the client is not counted.
            arrived = time.perf_counter()
            chat = parse_chat(body, service.policy.offered)
            if chat.model not in {self._name, *(route.version for route in service.routes.all)}:
                raise ApiError(
                    404,
                    f"Model {chat.model[:80]!r} is not served here; legal is {self._name}.",
                    code="model_not_found",
                    param="model",
                )
            resources.enter_context(service.admission.slot())
            prepared = await service.prepare(chat, request.state.request_id, arrived, request.state.owner)
            if chat.stream:
                # Waits for the first piece before sending a status, so that an error can set its own status.
                events = await resources.enter_async_context(aclosing(service.events(prepared)))
                first = await anext(events)
                include_usage = chat.stream_options is not None and chat.stream_options.include_usage
                stream_end = _StreamEnd()
                pieces = self._pieces(request, prepared, first, events, include_usage, stream_end)
                return _Stream(
                    pieces,
                    resources.pop_all(),
                    responses.headers(prepared),
                    stream_end,
                    lambda: self._cancelled(request),
                )
            end = await service.answer(prepared)
        answer = responses.completion(prepared, end, model=self._name, created=int(time.time()))
        return JSONResponse(
            answer, headers={**responses.headers(prepared), "server-timing": responses.server_timing(end)}
        )

    async def _pieces(
        self,
        request: Request,
        prepared: Prepared,
        first: Piece | Finished,
        rest: AsyncGenerator[Piece | Finished, None],
        include_usage: bool,
        stream_end: _StreamEnd,
    ) -> AsyncIterator[bytes]:
        created = int(time.time())
        try:
            yield responses.opening_chunk(prepared, model=self._name, created=created)
            event: Piece | Finished | None = first
            while event is not None:
                stream_end.logged = isinstance(event, Finished)
                if isinstance(event, Finished) or event.text or event.logprobs:
                    yield responses.chunk(prepared, event, model=self._name, created=created)
                if isinstance(event, Finished):
                    if include_usage:
                        yield responses.usage_chunk(prepared, event, model=self._name, created=created)
                    yield b"data: [DONE]\n\n"
                event = await anext(rest, None)
        except ApiError as error:
            # The status has been sent already, so the error goes to the log and into the last event.
            stream_end.logged = True
            self._refused(request, error)
            yield responses.sse(error.body())

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_object()]})

    async def _model(self, request: Request) -> Response:
        if request.path_params["model"] != self._name:
            raise ApiError(
                404,
                f"Model {request.path_params['model'][:80]!r} is not served here; legal is {self._name}.",
                code="model_not_found",
                param="model",
            )
        return JSONResponse(self._model_object())

    def _model_object(self) -> dict[str, Any]:
        service = self._service()
        champion = service.routes.champion
        costs = {
            budget: {"flops": cost.total, "kv_cache_bytes": cost.kv_cache_bytes}
            for budget, cost in champion.costs.items()
        }
        return {
            "id": self._name,
            "object": "model",
            "created": self._created,
            "owned_by": "parcelray",
            "version": champion.version,
            "reducer": champion.reducer_settings,
            "visual_tokens": list(service.policy.offered),
            "costs": costs,
        }

    async def _version(self, request: Request) -> Response:
        routes = self._service().routes
        return JSONResponse(
            {
                "parcelray": __version__,
                "models": [route.to_dict() for route in routes.all],
                "rolled_back": routes.rolled_back,
            }
        )

    async def _metrics(self, request: Request) -> Response:
        return Response(self._service().metrics.text(), media_type="text/plain; version=0.0.4")

    async def _openapi(self, request: Request) -> Response:
        service = self._service()
        return JSONResponse(
            openapi(self._name, service.policy.offered, service.limits.max_tokens, playground=self._http.playground)
        )

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        """Checks readiness by an answer of the champion through the normal request path."""
        await self._readiness.check(self._service().routes.champion.client)
        return JSONResponse({"status": "ready"})

    async def _inspect(self, request: Request) -> Response:
        async with self._body(request) as body:
            return JSONResponse(await inspect_request(body, self._service()))


class _Stream(StreamingResponse):
    """A stream of server-sent events that frees the resources of its request however it ends.

    This includes a client that disconnects before the first event.
    """

    def __init__(
        self,
        pieces: AsyncIterator[bytes],
        resources: AsyncExitStack,
        headers: dict[str, str],
        end: _StreamEnd,
        cancelled: Callable[[], None],
    ) -> None:
        super().__init__(pieces, headers={**headers, "cache-control": "no-cache"}, media_type="text/event-stream")
        self._resources = resources
        self._end = end
        self._cancelled = cancelled

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._resources:
            try:
                await super().__call__(scope, receive, send)
            finally:
                if not self._end.logged:
                    self._cancelled()


async def _http_error(request: Request, error: Exception) -> Response:
    """Responds to unknown paths and methods."""
    assert isinstance(error, HTTPException)
    allowed = (error.headers or {}).get("Allow", "")
    texts = {
        404: ("There is nothing at this path.", "not_found"),
        405: (
            f"This path does not support the method {request.method[:20]}; legal are {allowed}.",
            "method_not_allowed",
        ),
    }
    text, code = texts.get(error.status_code, ("The request is not valid.", "invalid_request"))
    return JSONResponse(
        ApiError(error.status_code, text, code=code).body(), error.status_code, dict(error.headers or {})
    )


async def _unexpected(request: Request, error: Exception) -> Response:
    """Responds to an unexpected error. The traceback goes to the log, not to the client."""
    logger.error("unexpected error in a request handler", exc_info=error)
    return JSONResponse(ApiError(500, "The server failed on this request.", code="internal_error").body(), 500)
