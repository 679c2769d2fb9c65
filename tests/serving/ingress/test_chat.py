"""Tests of the chat service over a scripted model: latencies, counts, and the fallback to the champion."""

import asyncio
import json
import random
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from parcelray.config.serve import CanaryConfig
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.serving.engine.engine import (
    EngineRefusal,
    EngineStats,
    Finished,
    GenerateRequest,
    ImagePixels,
    Inspection,
    Piece,
    PromptBuilder,
    Timings,
)
from parcelray.serving.http.api_errors import ApiError
from parcelray.serving.http.images import ImageReader
from parcelray.serving.http.schemas import ChatRequest, parse_chat
from parcelray.serving.ingress import chat as chat_module
from parcelray.serving.ingress.budget_policy import BudgetPolicy
from parcelray.serving.ingress.chat import Admission, ChatService
from parcelray.serving.ingress.clients import ReplicaLost
from parcelray.serving.ingress.metrics import EndpointMetrics
from parcelray.serving.ingress.request_log import RequestLog, RequestSampler
from parcelray.serving.ingress.routes import Route, Routes
from tests.serving.local import job_of

END = Finished(
    "red", "stop", 3, Timings(queue_s=0.1, vision_s=0.0, prefill_s=0.1, first_token_s=0.2, total_s=0.5), cached_images=0
)
KEPT: list[Mapping[str, Any]] = []
LOAD: dict[str, Any] = {"budgets": {"offered": [16, 64], "policy": {"type": "load", "objective_s": 10}}}


@dataclass
class Script:
    """A model that yields these events; an exception is raised."""

    events_of: list[Piece | Finished | Exception] = field(default_factory=lambda: [Piece("re"), Piece("d"), END])
    calls: int = 0

    async def events(self, request: GenerateRequest) -> AsyncGenerator[Piece | Finished, None]:
        self.calls += 1
        for event in self.events_of:
            await asyncio.sleep(0)
            if isinstance(event, Exception):
                raise event
            yield event

    async def inspect(self, image: ImagePixels, num_visual_tokens: int) -> Inspection:
        raise NotImplementedError

    async def stats(self) -> EngineStats:
        raise NotImplementedError

    async def ping(self) -> None:
        raise NotImplementedError

    async def release_silent(self) -> int:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of the service's clock, seconds; tests move it."""
    now = [1000.0]
    monkeypatch.setattr(chat_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


@pytest.fixture(scope="module")
def prompts(processor: ElasticProcessor) -> PromptBuilder:
    return PromptBuilder(processor)


def service(prompts: PromptBuilder, champion: Script, challenger: Script | None = None, **changes: Any) -> ChatService:
    job = job_of(**changes)
    canary = CanaryConfig.model_validate({"model": {}, "share": 0.999999, "min_requests": 1000})
    other = Route("v2", challenger, prompts, {}, share=canary.share) if challenger is not None else None
    return ChatService(
        routes=Routes(Route("v1", champion, prompts, {}), other, canary if other is not None else None),
        limits=job.limits,
        policy=BudgetPolicy(job.budgets),
        metrics=EndpointMetrics(job.name),
        admission=Admission(8),
        images=ImageReader(job.limits, job.http),
        log=RequestLog(RequestSampler(job.samples, KEPT.append, random.Random(0)) if job.samples is not None else None),
    )


def chat(*, stream: bool = False, **fields: Any) -> ChatRequest:
    return parse_chat(
        json.dumps(
            {"model": "mini", "messages": [{"role": "user", "content": "what"}], "stream": stream, **fields}
        ).encode(),
        (16, 64, 256),
    )


async def ask(
    service: ChatService, chat_request: ChatRequest, *, arrived: float = 1000.0, resume: asyncio.Event | None = None
) -> tuple[str, str]:
    """Returns the answer's text and model version; the client pauses after the first event until `resume` is set."""
    prepared = await service.prepare(chat_request, "r1", arrived)
    if not chat_request.stream:
        return (await service.answer(prepared)).text, prepared.route.version
    text = ""
    async for event in service.events(prepared):
        text += event.text if isinstance(event, Piece) else ""
        if resume is not None:
            await resume.wait()
    return text, prepared.route.version


def value(service: ChatService, name: str, **labels: str) -> float:
    found = service.metrics.registry.get_sample_value(f"parcel:{name}", {"model_name": "mini", **labels})
    assert found is not None, name
    return found


def in_flight(service: ChatService) -> int:
    assert service.policy.controller is not None
    return service.policy.controller._in_flight


@pytest.mark.parametrize("stream", [False, True])
def test_the_time_to_first_token_begins_at_the_arrival(prompts: PromptBuilder, stream: bool) -> None:
    chat_service = service(prompts, Script())
    asyncio.run(ask(chat_service, chat(stream=stream), arrived=998.0))
    first = value(chat_service, "time_to_first_token_seconds_sum", visual_tokens="0", engine="0")
    whole = value(chat_service, "e2e_request_latency_seconds_sum", visual_tokens="0", engine="0")
    assert whole == pytest.approx(2.0)
    assert whole - first == pytest.approx(END.timings.total_s - END.timings.first_token_s)


def test_a_slow_client_does_not_count_as_latency(prompts: PromptBuilder, now: list[float]) -> None:
    model = Script()
    chat_service = service(prompts, model, **LOAD)

    async def watched() -> None:
        resume = asyncio.Event()
        reading = asyncio.create_task(ask(chat_service, chat(stream=True), resume=resume))
        # The model finishes while the client has only its first piece.
        while not model.calls or in_flight(chat_service):
            await asyncio.sleep(0)
        now[0] += 500.0
        resume.set()
        assert await reading == ("red", "v1")

    asyncio.run(watched())
    assert value(chat_service, "e2e_request_latency_seconds_sum", visual_tokens="0", engine="0") == 0.0


def test_refused_requests_do_not_count_as_load(prompts: PromptBuilder) -> None:
    chat_service = service(prompts, Script(), **LOAD)
    with pytest.raises(ApiError, match="max_tokens"):
        asyncio.run(ask(chat_service, chat(max_tokens=100_000)))
    assert in_flight(chat_service) == 0
    full = service(prompts, Script([EngineRefusal("queue_full", "full")]), **LOAD)
    with pytest.raises(ApiError, match="full"):
        asyncio.run(ask(full, chat()))
    assert in_flight(full) == 0


def test_a_client_that_disconnects_cancels_its_request(prompts: PromptBuilder) -> None:
    closed = []

    class Endless(Script):
        async def events(self, request: GenerateRequest) -> AsyncGenerator[Piece | Finished, None]:
            try:
                while True:
                    await asyncio.sleep(0)
                    yield Piece("x")
            finally:
                closed.append(request.request_id)

    chat_service = service(prompts, Endless(), **LOAD)

    async def disconnect() -> None:
        events = chat_service.events(await chat_service.prepare(chat(stream=True), "r1", 1000.0))
        await anext(events)
        await events.aclose()

    asyncio.run(disconnect())
    assert (closed, in_flight(chat_service)) == (["r1"], 0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("failure", [EngineRefusal("engine_error", "broken"), ReplicaLost()])
def test_the_champion_answers_requests_that_the_challenger_failed_on(
    prompts: PromptBuilder, stream: bool, failure: Exception
) -> None:
    chat_service = service(prompts, Script(), Script([failure]))
    assert asyncio.run(ask(chat_service, chat(stream=stream))) == ("red", "v1")
    assert chat_service.routes.challenger is not None
    assert list(chat_service.routes.challenger.outcomes) == [None]
    assert value(chat_service, "requests_routed_total", version="v2", outcome="failed") == 1
    assert value(chat_service, "requests_routed_total", version="v1", outcome="answered") == 1


def test_a_failure_of_the_champion_is_not_sent_to_the_challenger(prompts: PromptBuilder) -> None:
    broken = [EngineRefusal("engine_error", "broken")]
    champion = Script([*broken])
    chat_service = service(prompts, champion, Script([*broken]))
    with pytest.raises(ApiError, match="broken"):
        asyncio.run(ask(chat_service, chat()))
    assert champion.calls == 1 + chat_service.limits.retries, "its other replicas, but no other version"


def test_a_started_answer_is_not_restarted_by_the_champion(prompts: PromptBuilder) -> None:
    champion = Script()
    chat_service = service(prompts, champion, Script([Piece("re"), EngineRefusal("engine_error", "broken")]))
    with pytest.raises(ApiError, match="broken"):
        asyncio.run(ask(chat_service, chat(stream=True)))
    assert champion.calls == 0


@pytest.mark.parametrize("texts", [False, True])
def test_samples_hold_texts_only_if_configured(prompts: PromptBuilder, texts: bool) -> None:
    KEPT.clear()
    chat_service = service(prompts, Script(), samples={"ratio": 1.0, "texts": texts})
    asyncio.run(ask(chat_service, chat(stream=True), arrived=998.0))
    (record,) = KEPT
    assert (record["model_version"], record["visual_tokens"], record["new_tokens"], record["asked"]) == (
        "v1",
        0,
        3,
        "auto",
    )
    assert (record["latency_s"], record["first_token_s"]) == (pytest.approx(2.0), pytest.approx(1.7))
    assert ("question" in record, "answer" in record, "image_sha256" in record) == (texts,) * 3
    assert not texts or (record["question"], record["answer"]) == ("what", "red")


def test_a_share_of_the_requests_is_sampled(prompts: PromptBuilder) -> None:
    KEPT.clear()
    chat_service = service(prompts, Script([END]), samples={"ratio": 0.2})
    for _ in range(300):
        asyncio.run(ask(chat_service, chat()))
    assert 40 <= len(KEPT) <= 80


def test_samples_need_a_store() -> None:
    with pytest.raises(ValueError, match=r"samples are stored in MLflow, but tracking\.uri is null"):
        job_of(samples={"ratio": 0.1}, tracking={"uri": None})
