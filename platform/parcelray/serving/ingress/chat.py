"""Answers validated requests with a model: budget, images, prompt, admission, route, retries and records."""

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace

from parcelray.config.serve import RequestLimits
from parcelray.serving.engine.engine import EngineRefusal, Finished, GenerateRequest, Piece, Sampling, last_event
from parcelray.serving.http.api_errors import ApiError, from_refusal, too_many
from parcelray.serving.http.images import ImageReader
from parcelray.serving.http.schemas import ChatRequest
from parcelray.serving.ingress.budget_policy import BudgetPolicy
from parcelray.serving.ingress.clients import ReplicaLost
from parcelray.serving.ingress.metrics import EndpointMetrics
from parcelray.serving.ingress.request_log import RequestLog
from parcelray.serving.ingress.routes import Route, Routes

logger = logging.getLogger(__name__)
_CLIENT_ERRORS = frozenset({"context_length_exceeded", "unsupported_budget", "cancelled", "queue_full"})
"""Refusals that do not count against the model version that gave them."""
_RETRYABLE = frozenset({"shutting_down", "engine_error"})
"""Refusals by one replica that another replica may not give."""
_RATE_WINDOW_S = 10.0
"""Time over which the rate of answers is measured, seconds."""
_MAX_RETRY_AFTER_S = 30


class Admission:
    """Bounds the number of requests in flight in one ingress.

    Args:
        capacity: maximum number of requests in flight; more are refused.
        clock: seconds, monotonic.
    """

    def __init__(self, capacity: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity = capacity
        self._clock = clock
        self._answers: deque[float] = deque(maxlen=1024)
        self.in_flight = 0

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Counts one request as in flight for the duration of the context.

        Raises:
            ApiError: 429 if the capacity is reached.
        """
        if self.in_flight >= self._capacity:
            message = f"The queue is full ({self.in_flight} requests in flight); retry the request later."
            raise too_many(message, code="queue_full", retry_after_s=self.retry_after_s())
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    def answered(self) -> None:
        """Records an answer. Refusals and failures end at once and do not predict when others will end."""
        self._answers.append(self._clock())

    def retry_after_s(self) -> int:
        """Estimates the seconds until half of the requests in flight are answered, 1 to 30."""
        now = self._clock()
        recent = sum(at >= now - _RATE_WINDOW_S for at in self._answers)
        rate = recent / _RATE_WINDOW_S
        return max(1, min(_MAX_RETRY_AFTER_S, math.ceil(self.in_flight / 2 / rate))) if rate else 1


@dataclass
class Prepared:
    """A request that is ready for its model."""

    chat: ChatRequest
    request: GenerateRequest
    """The engine's request. A budget that the replica chooses is entered with the first event."""
    route: Route
    """The model version that answers: after a failure of the challenger, the champion."""
    arrived: float
    """Time of arrival, by `time.perf_counter`."""
    image_s: float
    """Duration of decoding and scaling its images, seconds."""
    owner: str | None = None
    """Name of the API key that it came with."""

    @property
    def deadline(self) -> float:
        """Time at which the request is aborted, by the clock of `arrived`."""
        return self.arrived + self.request.timeout_s

    def attempt(self) -> GenerateRequest:
        """Returns the request for a replica, with the remaining time.

        Raises:
            EngineRefusal: no time remains.
        """
        remaining_s = self.deadline - time.perf_counter()
        if remaining_s <= 0:
            raise _deadline_exceeded()
        return replace(self.request, timeout_s=remaining_s)

    def patience_s(self) -> float:
        """Returns how long to wait for the next event of the replica, seconds.

        A replica enforces the same deadline itself, unless it hangs.
        """
        return max(0.0, self.deadline - time.perf_counter())


class ChatService:
    """Answers chat requests.

    Args:
        routes: the model versions.
        limits: limits of a request.
        policy: decides the visual-token budget.
        metrics: metrics of this ingress.
        admission: bounds the requests in flight.
        images: reads the images of requests.
        log: records every request.
    """

    def __init__(
        self,
        *,
        routes: Routes,
        limits: RequestLimits,
        policy: BudgetPolicy,
        metrics: EndpointMetrics,
        admission: Admission,
        images: ImageReader,
        log: RequestLog,
    ) -> None:
        self.routes = routes
        self.limits = limits
        self.policy = policy
        self.metrics = metrics
        self.admission = admission
        self.images = images
        self._log = log
        metrics.watch_in_flight(lambda: admission.in_flight)
        self._report_challenger()

    async def prepare(self, chat: ChatRequest, request_id: str, arrived: float, owner: str | None = None) -> Prepared:
        """Prepares a request without running the model: checks, budget, images, prompt and route.

        Raises:
            ApiError: the request cannot be answered as it is.
        """
        sampling = self._sampling(chat)
        self._check_sizes(chat)
        # Also decided without images, so that a budget that is not offered is always refused.
        decided = self.policy.decide(chat.asked_budget)
        budget = decided if chat.images else 0
        choices = self.policy.choices(chat.asked_budget)
        if chat.images and not choices:
            self.metrics.decided(chat.asked_budget, budget)
        if self.policy.controller is not None and chat.asked_budget == "auto" and chat.images:
            lowered, raised = self.policy.controller.new_steps()
            self.metrics.load_policy(budget, lowered=lowered, raised=raised)
        route = self.routes.pick()
        started = time.perf_counter()
        request = await self._request(chat, route, request_id, budget, sampling, self._remaining_s(arrived))
        request = replace(request, choices=choices if request.images else ())
        return Prepared(chat, request, route, arrived, time.perf_counter() - started, owner)

    async def answer(self, prepared: Prepared) -> Finished:
        """Returns the end of the answer, which holds the whole answer.

        Raises:
            ApiError: the request gets no answer.
        """
        return await last_event(self._events(prepared))

    def events(self, prepared: Prepared) -> AsyncGenerator[Piece | Finished, None]:
        """Yields the events of the answer, read from the model as fast as it generates them.

        Raises:
            ApiError: the request gets no answer, or the answer breaks off.
        """
        return read_ahead(self._events(prepared))

    async def _events(self, prepared: Prepared) -> AsyncGenerator[Piece | Finished, None]:
        """Yields the events of the answer; a request that fails on the challenger is sent to the champion.

        Only a request of which nothing was sent can go to another replica or version.
        """
        sent = answered = False
        self.policy.started()
        try:
            while not answered:
                try:
                    # Closed immediately when the client disconnects, which cancels the request.
                    async with aclosing(self._route_events(prepared)) as stream:
                        async for event in stream:
                            sent = True
                            if isinstance(event, Finished):
                                self._finished(prepared, event)
                                answered = True
                            yield event
                except EngineRefusal as refusal:
                    if sent:
                        raise self._refused(prepared, refusal) from None
                    await self._fall_back_to_champion(prepared, refusal)
        finally:
            if not answered:
                self.policy.failed(time.perf_counter() - prepared.arrived, in_answer=sent)

    async def _route_events(self, prepared: Prepared) -> AsyncGenerator[Piece | Finished, None]:
        """Yields the events of the request's model version, with retries on its other replicas."""
        sent = False
        for attempt in range(self.limits.retries + 1):
            try:
                async with aclosing(prepared.route.client.events(prepared.attempt())) as stream:
                    while (event := await _next(stream, prepared.patience_s())) is not None:
                        sent = True
                        self._enter_budget(prepared, event)
                        yield event
            except ReplicaLost:
                self._lost(prepared, attempt)
                if sent:
                    break
            except TimeoutError:
                raise _deadline_exceeded() from None
            except EngineRefusal as refusal:
                if sent or refusal.code not in _RETRYABLE or attempt >= self.limits.retries:
                    raise
                self._lost(prepared, attempt)
            else:
                return
        raise EngineRefusal("no_replica", "The replica that handled this request was lost; retry the request.")

    async def _fall_back_to_champion(self, prepared: Prepared, refusal: EngineRefusal) -> None:
        """Routes a request that the challenger failed on to the champion: the challenger is hidden from clients.

        Raises:
            ApiError: the refusal is the fault of the request, or came from the champion.
        """
        champion = self.routes.champion
        error = self._refused(prepared, refusal)
        if refusal.code in _CLIENT_ERRORS or prepared.route is champion:
            raise error from None
        before = prepared.request
        prepared.route = champion
        remaining_s = self._remaining_s(prepared.arrived)
        prepared.request = await self._request(
            prepared.chat, champion, before.request_id, before.num_visual_tokens, before.sampling, remaining_s
        )

    async def _request(
        self, chat: ChatRequest, route: Route, request_id: str, budget: int, sampling: Sampling, remaining_s: float
    ) -> GenerateRequest:
        images = await self.images.read(route.prompts, chat.image_urls, remaining_s)
        return route.prompts.request(
            request_id,
            chat.text,
            images,
            num_visual_tokens=budget,
            sampling=sampling,
            timeout_s=self.limits.timeout_s,
            stream=bool(chat.stream),
        )

    def _sampling(self, chat: ChatRequest) -> Sampling:
        max_tokens = chat.max_completion_tokens if chat.max_completion_tokens is not None else chat.max_tokens
        if max_tokens is not None and max_tokens > self.limits.max_tokens:
            field = "max_tokens" if chat.max_completion_tokens is None else "max_completion_tokens"
            message = f"{field} is {max_tokens}; legal values are 1 to {self.limits.max_tokens}."
            raise ApiError(422, message, code="invalid_value", param=field)
        return Sampling(
            max_new_tokens=max_tokens or self.limits.default_max_tokens,
            temperature=chat.temperature or 0.0,
            top_p=1.0 if chat.top_p is None else chat.top_p,
            seed=chat.seed,
            stop=chat.stops,
            logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
        )

    def _remaining_s(self, arrived: float) -> float:
        return max(0.001, self.limits.timeout_s - (time.perf_counter() - arrived))

    def _check_sizes(self, chat: ChatRequest) -> None:
        if len(chat.images) > self.limits.images:
            message = f"The request has {len(chat.images)} images; the maximum is {self.limits.images}."
            raise ApiError(413, message, code="too_many_images", param="messages")
        if len(chat.text) > self.limits.prompt_chars:
            message = f"The texts have {len(chat.text)} characters; the maximum is {self.limits.prompt_chars}."
            raise ApiError(413, message, code="prompt_too_long", param="messages")

    def _enter_budget(self, prepared: Prepared, event: Piece | Finished) -> None:
        """Enters the budget that the replica chose."""
        if prepared.request.choices:
            prepared.request = replace(prepared.request, num_visual_tokens=event.num_visual_tokens, choices=())
            self.metrics.decided("auto", event.num_visual_tokens)

    def _finished(self, prepared: Prepared, end: Finished) -> None:
        latency_s = time.perf_counter() - prepared.arrived
        # The time before the engine (HTTP, images, routing) is also part of the client's time to first token.
        first_token_s = latency_s - (end.timings.total_s - end.timings.first_token_s)
        self.admission.answered()
        self.policy.answered(latency_s, first_token_s)
        self.metrics.finished(
            prepared.request, end, latency_s=latency_s, first_token_s=first_token_s, image_s=prepared.image_s
        )
        self._record(prepared, latency_s)
        self._log.answered(
            prepared.request,
            end,
            owner=prepared.owner,
            version=prepared.route.version,
            question=prepared.chat.text,
            requested_budget=prepared.chat.asked_budget,
            latency_s=latency_s,
            first_token_s=first_token_s,
        )

    def _refused(self, prepared: Prepared, refusal: EngineRefusal) -> ApiError:
        if refusal.code not in _CLIENT_ERRORS:
            self._record(prepared, None)
        return from_refusal(refusal, self.admission.retry_after_s())

    def _lost(self, prepared: Prepared, attempt: int) -> None:
        logger.warning("request %s was lost by its replica at attempt %d", prepared.request.request_id, attempt + 1)
        if attempt < self.limits.retries:
            self.metrics.retried()

    def _record(self, prepared: Prepared, latency_s: float | None) -> None:
        before = self.routes.rolled_back
        self.routes.record(prepared.route, latency_s)
        self.metrics.routed(prepared.route.version, "failed" if latency_s is None else "answered")
        if self.routes.rolled_back is not None and before is None:
            logger.error("the challenger was rolled back and gets no more requests: %s", self.routes.rolled_back)
            self._report_challenger()

    def _report_challenger(self) -> None:
        challenger = self.routes.challenger
        self.metrics.challenger(
            challenger.version if challenger is not None else None, rolled_back=self.routes.rolled_back is not None
        )


async def read_ahead(source: AsyncGenerator[Piece | Finished, None]) -> AsyncGenerator[Piece | Finished, None]:
    """Yields the events of a source that is read at its own speed; closing this closes the source.

    Events that were not yet taken are buffered, so the source must be bounded, as an answer is.
    """
    buffer: asyncio.Queue[Piece | Finished | None] = asyncio.Queue()

    async def read() -> None:
        try:
            async with aclosing(source):
                async for event in source:
                    buffer.put_nowait(event)
        finally:
            buffer.put_nowait(None)

    reading = asyncio.create_task(read())
    try:
        while (event := await buffer.get()) is not None:
            yield event
        await reading
    finally:
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await reading


async def _next(stream: AsyncGenerator[Piece | Finished, None], patience_s: float) -> Piece | Finished | None:
    """Returns the next event, or None at the end of the stream.

    Raises:
        TimeoutError: the event does not come in time.
    """
    async with asyncio.timeout(patience_s):
        return await anext(stream, None)


def _deadline_exceeded() -> EngineRefusal:
    return EngineRefusal("deadline_exceeded", "The request was not finished by its deadline.")
