"""From a validated request to a model's answer: budget, images, prompt, route, retries, records."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace

from parcelray.config.serve import RequestLimits
from parcelray.serving.engine.engine import EngineRefusal, Finished, GenerateRequest, Piece, Sampling
from parcelray.serving.http.api_errors import ApiError, from_refusal
from parcelray.serving.http.images import ImageReader
from parcelray.serving.http.schemas import ChatRequest
from parcelray.serving.ingress.admission import Admission
from parcelray.serving.ingress.budget_policy import BudgetPolicy
from parcelray.serving.ingress.clients import ReplicaLost
from parcelray.serving.ingress.metrics import EndpointMetrics
from parcelray.serving.ingress.read_ahead import read_ahead
from parcelray.serving.ingress.request_log import RequestLog
from parcelray.serving.ingress.routes import Route, Routes
from parcelray.serving.ingress.spans import annotate

logger = logging.getLogger(__name__)
_CLIENT_ERRORS = frozenset({"context_length_exceeded", "unsupported_budget", "cancelled", "queue_full"})
"""Refusals that say nothing against the version that gave them."""
_ELSEWHERE = frozenset({"shutting_down", "engine_error"})
"""Refusals of one replica that another one need not give."""
_MARGIN_S = 5.0
"""Beyond the deadline, which the replica keeps; a replica that hangs does not, and must not hold a request for ever."""


@dataclass
class Prepared:
    """A request that is ready for its model."""

    chat: ChatRequest
    request: GenerateRequest
    """With the first event its budget is settled, also where the replica chooses it."""
    route: Route
    """Whose answer it is: the champion's, once a challenger has failed on it."""
    arrived: float
    image_s: float
    """Decoding and scaling its images."""
    owner: str | None = None
    """Whose key it came with."""

    @property
    def deadline(self) -> float:
        """When it is given up, by the clock of `arrived`."""
        return self.arrived + self.request.timeout_s

    def attempt(self) -> GenerateRequest:
        """The request as it goes to a replica now, with the time that is left to it.

        Raises:
            EngineRefusal: none is left.
        """
        left = self.deadline - time.perf_counter()
        if left <= 0:
            raise _late()
        return replace(self.request, timeout_s=left)

    def patience_s(self) -> float:
        """How long to wait for the replica's next sign."""
        return max(0.0, self.deadline - time.perf_counter()) + _MARGIN_S


class ChatService:
    """Answers chat requests.

    Args:
        routes: the model versions.
        limits: of requests.
        policy: of budgets.
        metrics: of this ingress.
        admission: what it may have in flight.
        images: reads them.
        log: one record a request.
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
        self._tell_of_challenger()

    async def prepare(self, chat: ChatRequest, request_id: str, arrived: float, owner: str | None = None) -> Prepared:
        """Everything that can be refused without the model.

        Raises:
            ApiError: the request cannot be answered as it is.
        """
        sampling = self._sampling(chat)
        self._check_sizes(chat)
        # Decided without images, too: a budget that is not offered is never passed over.
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
        request = await self._request(chat, route, request_id, budget, sampling, self._left(arrived))
        request = replace(request, choices=choices if request.images else ())
        return Prepared(chat, request, route, arrived, time.perf_counter() - started, owner)

    async def answer(self, prepared: Prepared) -> Finished:
        """The whole answer; a request whose replica died or failed goes to another one, and one on which a challenger failed to the champion.

        Raises:
            ApiError: there is none.
        """
        answered = False
        self.policy.started()
        try:
            while True:
                try:
                    end = await self._answer(prepared)
                except EngineRefusal as refusal:
                    await self._turn_to_champion(prepared, refusal)
                else:
                    self._finished(prepared, end)
                    answered = True
                    return end
        finally:
            if not answered:
                self.policy.failed(time.perf_counter() - prepared.arrived, in_answer=False)

    def events(self, prepared: Prepared) -> AsyncGenerator[Piece | Finished, None]:
        """The answer in pieces, taken from the model as it makes them.

        Only a request of which nothing was sent can go to another replica or version.

        Raises:
            ApiError: there is none, or it ends in the middle.
        """
        return read_ahead(self._events(prepared))

    async def _events(self, prepared: Prepared) -> AsyncGenerator[Piece | Finished, None]:
        sent = answered = False
        self.policy.started()
        try:
            while not answered:
                try:
                    # Closed at once when the client hangs up, which is what cancels the request.
                    async with aclosing(self._pieces(prepared)) as found:
                        async for event in found:
                            sent = True
                            if isinstance(event, Finished):
                                self._finished(prepared, event)
                                answered = True
                            yield event
                except EngineRefusal as refusal:
                    if sent:
                        raise self._refused(prepared, refusal) from None
                    await self._turn_to_champion(prepared, refusal)
        finally:
            if not answered:
                self.policy.failed(time.perf_counter() - prepared.arrived, in_answer=sent)

    async def _answer(self, prepared: Prepared) -> Finished:
        """Of the route's version."""
        for attempt in range(self.limits.retries + 1):
            try:
                async with asyncio.timeout(prepared.patience_s()):
                    end = await prepared.route.client.answer(prepared.attempt())
            except ReplicaLost:
                self._lost(prepared, attempt)
            except TimeoutError:
                raise _late() from None
            except EngineRefusal as refusal:
                if not self._goes_elsewhere(refusal, attempt):
                    raise
                self._lost(prepared, attempt)
            else:
                self._settle(prepared, end)
                return end
        raise _gone()

    async def _pieces(self, prepared: Prepared) -> AsyncGenerator[Piece | Finished, None]:
        """Of the route's version."""
        sent = False
        for attempt in range(self.limits.retries + 1):
            try:
                async with aclosing(prepared.route.client.events(prepared.attempt())) as found:
                    while (event := await _next(found, prepared.patience_s())) is not None:
                        sent = True
                        self._settle(prepared, event)
                        yield event
            except ReplicaLost:
                self._lost(prepared, attempt)
                if sent:
                    break
            except TimeoutError:
                raise _late() from None
            except EngineRefusal as refusal:
                if sent or not self._goes_elsewhere(refusal, attempt):
                    raise
                self._lost(prepared, attempt)
            else:
                return
        raise _gone()

    async def _turn_to_champion(self, prepared: Prepared, refusal: EngineRefusal) -> None:
        """A challenger is tried on requests whose senders know nothing of it: what it fails on is the champion's to answer.

        Raises:
            ApiError: the refusal is the request's own fault, or was the champion's.
        """
        champion = self.routes.champion
        error = self._refused(prepared, refusal)
        if refusal.code in _CLIENT_ERRORS or prepared.route is champion:
            raise error from None
        asked = prepared.request
        prepared.route = champion
        left_s = self._left(prepared.arrived)
        prepared.request = await self._request(
            prepared.chat, champion, asked.request_id, asked.num_visual_tokens, asked.sampling, left_s
        )

    async def _request(
        self, chat: ChatRequest, route: Route, request_id: str, budget: int, sampling: Sampling, left_s: float
    ) -> GenerateRequest:
        images = await self.images.read(route.prompts, chat.image_urls, left_s)
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
        asked = chat.max_completion_tokens if chat.max_completion_tokens is not None else chat.max_tokens
        if asked is not None and asked > self.limits.max_tokens:
            field = "max_tokens" if chat.max_completion_tokens is None else "max_completion_tokens"
            raise ApiError(
                422, f"{field} is {asked}; legal are 1 to {self.limits.max_tokens}.", code="invalid_value", param=field
            )
        return Sampling(
            max_new_tokens=asked or self.limits.default_max_tokens,
            temperature=chat.temperature or 0.0,
            top_p=1.0 if chat.top_p is None else chat.top_p,
            seed=chat.seed,
            stop=chat.stops,
            logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
        )

    def _left(self, arrived: float) -> float:
        """Seconds until the request is given up."""
        return max(0.001, self.limits.timeout_s - (time.perf_counter() - arrived))

    def _check_sizes(self, chat: ChatRequest) -> None:
        if len(chat.images) > self.limits.images:
            message = f"The request has {len(chat.images)} images; legal are {self.limits.images} at most."
            raise ApiError(413, message, code="too_many_images", param="messages")
        if len(chat.text) > self.limits.prompt_chars:
            message = f"The texts have {len(chat.text)} characters; legal are {self.limits.prompt_chars} at most."
            raise ApiError(413, message, code="prompt_too_long", param="messages")

    def _settle(self, prepared: Prepared, event: Piece | Finished) -> None:
        """Takes over the budget that the replica chose."""
        if prepared.request.choices:
            prepared.request = replace(prepared.request, num_visual_tokens=event.num_visual_tokens, choices=())
            self.metrics.decided("auto", event.num_visual_tokens)

    def _goes_elsewhere(self, refusal: EngineRefusal, attempt: int) -> bool:
        return refusal.code in _ELSEWHERE and attempt < self.limits.retries

    def _finished(self, prepared: Prepared, end: Finished) -> None:
        latency_s = time.perf_counter() - prepared.arrived
        # What came before the engine (HTTP, images, routing) is the client's wait for the first token, too.
        first_token_s = latency_s - (end.timings.total_s - end.timings.first_token_s)
        self.admission.answered()
        self.policy.answered(latency_s, first_token_s)
        self.metrics.finished(
            prepared.request, end, latency_s=latency_s, first_token_s=first_token_s, image_s=prepared.image_s
        )
        self._record(prepared, latency_s)
        self._log.answered(
            prepared.request, end, owner=prepared.owner, version=prepared.route.version, latency_s=latency_s
        )
        if self._log.samples is not None:
            self._log.samples.answered(
                prepared.request,
                end,
                question=prepared.chat.text,
                asked=prepared.chat.asked_budget,
                version=prepared.route.version,
                latency_s=latency_s,
                first_token_s=first_token_s,
            )
        annotate(prepared.request, end, version=prepared.route.version)

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
            logger.error("the challenger gets no more requests: %s", self.routes.rolled_back)
            self._tell_of_challenger()

    def _tell_of_challenger(self) -> None:
        challenger = self.routes.challenger
        self.metrics.challenger(
            challenger.version if challenger is not None else None, rolled_back=self.routes.rolled_back is not None
        )


def _gone() -> EngineRefusal:
    return EngineRefusal("no_replica", "The replica that had this request is gone; send the request again.")


async def _next(found: AsyncGenerator[Piece | Finished, None], patience_s: float) -> Piece | Finished | None:
    """The next event; None: there is none.

    Raises:
        TimeoutError: it does not come.
    """
    async with asyncio.timeout(patience_s):
        return await anext(found, None)


def _late() -> EngineRefusal:
    return EngineRefusal("deadline_exceeded", "The request was not finished by its deadline.")
