"""The HTTP interface, as an ASGI application: OpenAI's chat completions, models, health, metrics and the playground.

It runs on Ray Serve (`ingress`) and, in tests, alone.
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
from parcelray.serving.ingress.readiness import Readiness
from parcelray.serving.ingress.request_log import RequestLog

logger = logging.getLogger(__name__)
_HOST = re.compile(r"(?P<name>\[[0-9a-fA-F:]+\]|[^:]*)(:\d+)?")
Handler = Callable[[Request], Awaitable[Response]]


@dataclass
class _End:
    """Of a stream."""

    told: bool = False
    """Whether the log has it."""


class Api:
    """The handlers of one endpoint.

    Args:
        name: the model's name in requests.
        http: of the job.
        service: answers chat requests; a function, because a rolling update puts another one in its place.
        gatekeeper: knows the keys.
        log: one record a request.
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
        """The ASGI application."""
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
        """Turns refusals into answers."""

        async def wrapped(request: Request) -> Response:
            # Ours, not the client's: ids in flight must differ.
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
                # Serve's proxy does so when the client hangs up.
                self._cancelled(request)
                raise
            # Serve's proxy gives every request such a header, and puts it on the answer itself.
            if "x-request-id" not in request.headers:
                response.headers["x-request-id"] = request.state.request_id
            return response

        return wrapped

    def _guarded(self, handler: Handler) -> Handler:
        """The same, for those with a key."""

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
        """The body of a request, within its limits."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(
                415, f"The content type is {kind[:60]!r}; legal is application/json.", code="unsupported_content_type"
            )
        return self._bodies.read(request.stream(), self._service().limits, request.headers.get("content-length"))

    def _check_host(self, request: Request) -> None:
        """On the loopback without keys only requests that name it: else a web page could reach the model by a name that resolves here."""
        if self._http.keys_file is not None:
            return
        match = _HOST.fullmatch(request.headers.get("host", ""))
        if match is None or match["name"].strip("[]") not in LOOPBACK:
            raise ApiError(
                403,
                f"The Host header is not one of {', '.join(sorted(LOOPBACK))}; this endpoint serves its own machine.",
                code="host",
            )

    async def _chat(self, request: Request) -> Response:
        service = self._service()
        async with AsyncExitStack() as visit:
            # A place is taken once the body is there, so that slow clients take none.
            body = await visit.enter_async_context(self._body(request))
            # From here on: how slowly a client sends is no time of the endpoint's.
            arrived = time.perf_counter()
            chat = parse_chat(body, service.policy.offered)
            if chat.model not in {self._name, *(route.version for route in service.routes.all)}:
                raise ApiError(
                    404,
                    f"Model {chat.model[:80]!r} is not served here; legal is {self._name}.",
                    code="model_not_found",
                    param="model",
                )
            visit.enter_context(service.admission.slot())
            prepared = await service.prepare(chat, request.state.request_id, arrived, request.state.owner)
            if chat.stream:
                # The first piece comes before the status, so that a refusal has one of its own.
                events = await visit.enter_async_context(aclosing(service.events(prepared)))
                first = await anext(events)
                include_usage = chat.stream_options is not None and chat.stream_options.include_usage
                stream_end = _End()
                pieces = self._pieces(request, prepared, first, events, include_usage, stream_end)
                return _Stream(
                    pieces, visit.pop_all(), responses.headers(prepared), stream_end, lambda: self._cancelled(request)
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
        stream_end: _End,
    ) -> AsyncIterator[bytes]:
        created = int(time.time())
        try:
            yield responses.opening_chunk(prepared, model=self._name, created=created)
            event: Piece | Finished | None = first
            while event is not None:
                stream_end.told = isinstance(event, Finished)
                if isinstance(event, Finished) or event.text or event.logprobs:
                    yield responses.chunk(prepared, event, model=self._name, created=created)
                if isinstance(event, Finished):
                    if include_usage:
                        yield responses.usage_chunk(prepared, event, model=self._name, created=created)
                    yield b"data: [DONE]\n\n"
                event = await anext(rest, None)
        except ApiError as error:
            # The status is out already, so that only the log and the last event can say it.
            stream_end.told = True
            self._refused(request, error)
            yield responses.sse(error.body())

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        if request.path_params["model"] != self._name:
            raise ApiError(
                404,
                f"Model {request.path_params['model'][:80]!r} is not served here; legal is {self._name}.",
                code="model_not_found",
                param="model",
            )
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
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
        """An answer of the champion, made on the way that requests take."""
        await self._readiness.check(self._service().routes.champion.client)
        return JSONResponse({"status": "ready"})

    async def _inspect(self, request: Request) -> Response:
        async with self._body(request) as body:
            return JSONResponse(await inspect_request(body, self._service()))


class _Stream(StreamingResponse):
    """Server-sent events that give back what the request held however they end, also when the client is gone before the first of them."""

    def __init__(
        self,
        pieces: AsyncIterator[bytes],
        visit: AsyncExitStack,
        headers: dict[str, str],
        end: _End,
        cancelled: Callable[[], None],
    ) -> None:
        super().__init__(pieces, headers={**headers, "cache-control": "no-cache"}, media_type="text/event-stream")
        self._visit = visit
        self._end = end
        self._cancelled = cancelled

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._visit:
            try:
                await super().__call__(scope, receive, send)
            finally:
                if not self._end.told:
                    self._cancelled()


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods."""
    assert isinstance(error, HTTPException)
    allowed = (error.headers or {}).get("Allow", "")
    texts = {
        404: ("There is nothing at this path.", "not_found"),
        405: (f"This path does not take the method {request.method[:20]}; legal are {allowed}.", "method_not_allowed"),
    }
    text, code = texts.get(error.status_code, ("The request cannot be answered.", "invalid_request"))
    return JSONResponse(
        ApiError(error.status_code, text, code=code).body(), error.status_code, dict(error.headers or {})
    )


async def _unexpected(request: Request, error: Exception) -> Response:
    """A defect of ours: the trace goes to the log, not to the client."""
    logger.error("an unexpected error", exc_info=error)
    return JSONResponse(ApiError(500, "The server failed on this request.", code="internal_error").body(), 500)
