"""The HTTP interface, as an ASGI application: OpenAI's chat completions, models, health, metrics and the playground.

It runs on Ray Serve (`ingress`) and, in tests, alone.
"""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from parcelray import __version__
from parcelray.config.serve import LOOPBACK, HttpConfig
from parcelray.serving import responses
from parcelray.serving.api_errors import ApiError, from_refusal
from parcelray.serving.auth import Gatekeeper
from parcelray.serving.chat import ChatService, Prepared
from parcelray.serving.clients import ReplicaLost
from parcelray.serving.engine import EngineRefusal, Finished, Piece
from parcelray.serving.openapi import openapi
from parcelray.serving.playground import inspect_request, playground_routes
from parcelray.serving.request_log import RequestLog
from parcelray.serving.schemas import parse_chat

logger = logging.getLogger(__name__)
_MIB = 1024**2
_READY_TIMEOUT_S = 10.0
_HOST = re.compile(r"(?P<name>\[[0-9a-fA-F:]+\]|[^:]*)(:\d+)?")
Handler = Callable[[Request], Awaitable[Response]]


class Api:
    """The handlers of one endpoint.

    Args:
        name: the model's name in requests.
        http: of the job.
        service: answers chat requests; a function, because a rolling update puts another one in its place.
        gatekeeper: knows the keys.
        log: one record a request.
    """

    def __init__(self, name: str, http: HttpConfig, service: Callable[[], ChatService], gatekeeper: Gatekeeper, log: RequestLog) -> None:
        self._name = name
        self._http = http
        self._service = service
        self._gatekeeper = gatekeeper
        self._log = log
        self._created = int(time.time())

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
            routes += [*playground_routes(), Route("/playground/inspect", self._guarded(self._inspect), methods=["POST"])]
        return Starlette(routes=routes, exception_handlers={HTTPException: _http_error, Exception: _unexpected})

    def _open(self, handler: Handler) -> Handler:
        """Turns refusals into answers."""

        async def wrapped(request: Request) -> Response:
            # Ours, not the client's: ids in flight must differ.
            request.state.request_id = f"chatcmpl-{secrets.token_hex(12)}"
            try:
                self._check_host(request)
                response = await handler(request)
            except ApiError as error:
                self._service().metrics.rejected(error.code)
                self._log.refused(request.state.request_id, status=error.status, code=error.code)
                response = JSONResponse(error.body(), error.status, error.headers)
            except ClientDisconnect:
                response = Response(status_code=499)
            # Serve's proxy gives every request such a header, and puts it on the answer itself.
            if "x-request-id" not in request.headers:
                response.headers["x-request-id"] = request.state.request_id
            return response

        return wrapped

    def _guarded(self, handler: Handler) -> Handler:
        """The same, for those with a key."""

        async def admitted(request: Request) -> Response:
            self._gatekeeper.admit(request.headers.get("authorization"))
            return await handler(request)

        return self._open(admitted)

    def _check_host(self, request: Request) -> None:
        """On the loopback without keys only requests that name it: else a web page could reach the model by a name that resolves here."""
        if self._http.keys_file is not None:
            return
        match = _HOST.fullmatch(request.headers.get("host", ""))
        if match is None or match["name"].strip("[]") not in LOOPBACK:
            raise ApiError(403, f"The Host header is not one of {', '.join(sorted(LOOPBACK))}; this endpoint serves its own machine.", code="host")

    async def _chat(self, request: Request) -> Response:
        service = self._service()
        body = await _body(request, service)
        # From here on: how slowly a client sends is no time of the endpoint's.
        arrived = time.perf_counter()
        chat = parse_chat(body)
        if chat.model not in {self._name, *(route.version for route in service.routes.all)}:
            raise ApiError(404, f"Model {chat.model[:80]!r} is not served here; legal is {self._name}.", code="model_not_found", param="model")
        async with AsyncExitStack() as visit:
            visit.enter_context(service.admission.slot())
            prepared = await service.prepare(chat, request.state.request_id, arrived)
            if chat.stream:
                # The first piece comes before the status, so that a refusal has one of its own.
                events = await visit.enter_async_context(aclosing(service.events(prepared)))
                first = await anext(events)
                include_usage = chat.stream_options is not None and chat.stream_options.include_usage
                return _Stream(self._pieces(prepared, first, events, include_usage), visit.pop_all(), responses.headers(prepared))
            end = await service.answer(prepared)
        answer = responses.completion(prepared, end, model=self._name, created=int(time.time()))
        return JSONResponse(answer, headers={**responses.headers(prepared), "server-timing": responses.server_timing(end)})

    async def _pieces(
        self, prepared: Prepared, first: Piece | Finished, rest: AsyncGenerator[Piece | Finished, None], include_usage: bool
    ) -> AsyncIterator[bytes]:
        created = int(time.time())
        try:
            yield responses.opening_chunk(prepared, model=self._name, created=created)
            event: Piece | Finished | None = first
            while event is not None:
                yield responses.chunk(prepared, event, model=self._name, created=created)
                if isinstance(event, Finished):
                    if include_usage:
                        yield responses.usage_chunk(prepared, event, model=self._name, created=created)
                    yield b"data: [DONE]\n\n"
                event = await anext(rest, None)
        except ApiError as error:
            yield responses.sse(error.body())

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        if request.path_params["model"] != self._name:
            raise ApiError(
                404, f"Model {request.path_params['model'][:80]!r} is not served here; legal is {self._name}.", code="model_not_found", param="model"
            )
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        service = self._service()
        champion = service.routes.champion
        costs = {budget: {"flops": cost.total, "kv_cache_bytes": cost.kv_cache_bytes} for budget, cost in champion.costs.items()}
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
        return JSONResponse({"parcelray": __version__, "models": [route.to_dict() for route in routes.all], "rolled_back": routes.rolled_back})

    async def _metrics(self, request: Request) -> Response:
        return Response(self._service().metrics.text(), media_type="text/plain; version=0.0.4")

    async def _openapi(self, request: Request) -> Response:
        return JSONResponse(openapi(self._name))

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        """An answer of the champion, made on the way that requests take."""
        service = self._service()
        try:
            await asyncio.wait_for(service.routes.champion.client.ping(), _READY_TIMEOUT_S)
        except (TimeoutError, ReplicaLost):
            raise ApiError(503, "The model does not answer.", code="not_ready", headers={"retry-after": "1"}) from None
        except EngineRefusal as refusal:
            raise from_refusal(refusal, 1) from None
        return JSONResponse({"status": "ready"})

    async def _inspect(self, request: Request) -> Response:
        service = self._service()
        return JSONResponse(await inspect_request(await _body(request, service), service))


class _Stream(StreamingResponse):
    """Server-sent events that give back what the request held however they end, also when the client is gone before the first of them."""

    def __init__(self, pieces: AsyncIterator[bytes], visit: AsyncExitStack, headers: dict[str, str]) -> None:
        super().__init__(pieces, headers={**headers, "cache-control": "no-cache"}, media_type="text/event-stream")
        self._visit = visit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._visit:
            await super().__call__(scope, receive, send)


async def _body(request: Request, service: ChatService) -> bytes:
    """The body of a request, within its limits of size and time."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"The content type is {kind[:60]!r}; legal is application/json.", code="unsupported_content_type")
    longest = int(service.limits.body_mb * _MIB)
    too_large = ApiError(413, f"The body is larger than {service.limits.body_mb:g} MiB.", code="body_too_large", headers={"connection": "close"})
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > longest:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(service.limits.body_timeout_s):
            async for piece in request.stream():
                body += piece
                if len(body) > longest:
                    raise too_large
    except TimeoutError:
        message = f"The body did not arrive within {service.limits.body_timeout_s:g} s."
        raise ApiError(408, message, code="body_timeout", headers={"connection": "close"}) from None
    return bytes(body)


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods."""
    assert isinstance(error, HTTPException)
    text = {404: "There is nothing at this path.", 405: "This path does not take this method."}.get(error.status_code, "The request cannot be answered.")
    return JSONResponse(ApiError(error.status_code, text, code="not_found").body(), error.status_code, dict(error.headers or {}))


async def _unexpected(request: Request, error: Exception) -> Response:
    """A defect of ours: the trace goes to the log, not to the client."""
    logger.error("an unexpected error", exc_info=error)
    return JSONResponse(ApiError(500, "The server failed on this request.", code="internal_error").body(), 500)
