"""Tests of retries: on another replica where that can help, with one deadline over all attempts."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from parcelray.datasets.sample import Sample
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.serving.engine.continuous_engine import ContinuousEngine
from parcelray.serving.engine.engine import EngineRefusal, Finished, GenerateRequest, Piece, last_event
from parcelray.serving.http.api_errors import ApiError
from parcelray.serving.http.schemas import parse_chat
from parcelray.serving.ingress import clients
from parcelray.serving.ingress.chat import ChatService, Prepared
from parcelray.serving.ingress.clients import HandleClient, LocalClient, ReplicaLost
from tests.serving.conftest import Asker
from tests.serving.http.test_api import message
from tests.serving.local import PATIENCE_S, job_of, service_of

Ask = Callable[[ChatService, Prepared], Any]


class Failing(LocalClient):
    """A client whose first attempts fail with the given exceptions (None: hangs), and which then answers."""

    def __init__(self, engine: ContinuousEngine, *first: Exception | None, after: int = 0) -> None:
        super().__init__(engine)
        self.attempts: list[GenerateRequest] = []
        self._first = list(first)
        self._after = after

    async def _fail(self, request: GenerateRequest) -> None:
        self.attempts.append(request)
        if self._first:
            first = self._first.pop(0)
            if first is None:
                await asyncio.Event().wait()
            else:
                raise first

    async def events(self, request: GenerateRequest) -> AsyncGenerator[Piece | Finished, None]:
        for number in range(self._after):
            yield Piece(str(number))
        await self._fail(request)
        async for event in super().events(request):
            yield event


async def _whole(service: ChatService, prepared: Prepared) -> str:
    return (await service.answer(prepared)).text


async def _streamed(service: ChatService, prepared: Prepared) -> str:
    return "".join([event.text async for event in service.events(prepared) if isinstance(event, Piece)])


@pytest.fixture(params=[_whole, _streamed])
def run(
    request: pytest.FixtureRequest, model: ElasticVLM, processor: ElasticProcessor, samples: list[Sample], ask: Asker
) -> Callable[..., str]:
    def send(client: Failing, timeout_s: float = PATIENCE_S, arrived_s: float = 0.0) -> str:
        service = service_of(job_of(), model, processor, client)
        engine_request = replace(ask(samples[0], 64, stream=request.param is _streamed), timeout_s=timeout_s)
        prepared = Prepared(
            parse_chat(json.dumps({"model": "mini", "messages": message(samples[0])}).encode(), (16, 64, 256)),
            engine_request,
            service.routes.champion,
            time.perf_counter() - arrived_s,
            0.0,
        )
        return cast(str, asyncio.run(request.param(service, prepared)))

    return send


@pytest.mark.parametrize(
    "first", [ReplicaLost(), EngineRefusal("shutting_down", "x"), EngineRefusal("engine_error", "x")]
)
def test_a_request_is_retried_after_its_replica_failed(
    run: Callable[..., str], engine: ContinuousEngine, first: Exception
) -> None:
    client = Failing(engine, first)
    assert run(client) == run(Failing(engine))
    assert len(client.attempts) == 2
    with pytest.raises(ApiError) as error:
        run(Failing(engine, first, first, first))
    assert (error.value.status, error.value.code) == (
        503,
        "no_replica" if isinstance(first, ReplicaLost) else cast(EngineRefusal, first).code,
    )


def test_a_refusal_that_any_replica_would_give_is_not_retried(
    run: Callable[..., str], engine: ContinuousEngine
) -> None:
    client = Failing(engine, EngineRefusal("context_length_exceeded", "too long"))
    with pytest.raises(ApiError, match="too long"):
        run(client)
    assert len(client.attempts) == 1


# A non-streamed answer has no event before its end.
@pytest.mark.parametrize("run", [_streamed], indirect=True)
def test_a_started_stream_is_not_retried(engine: ContinuousEngine, run: Callable[..., str]) -> None:
    client = Failing(engine, EngineRefusal("engine_error", "in the middle"), after=2)
    with pytest.raises(ApiError, match="in the middle"):
        run(client)
    assert len(client.attempts) == 1


def test_all_attempts_share_one_deadline(run: Callable[..., str], engine: ContinuousEngine) -> None:
    client = Failing(engine, ReplicaLost())
    # One third of its time has passed; the two attempts share the rest.
    run(client, timeout_s=3 * PATIENCE_S, arrived_s=PATIENCE_S)
    assert all(PATIENCE_S < each.timeout_s <= 2 * PATIENCE_S for each in client.attempts)
    assert client.attempts[1].timeout_s < client.attempts[0].timeout_s
    late = Failing(engine)
    with pytest.raises(ApiError) as error:
        run(late, timeout_s=1.0, arrived_s=1.5)
    assert (error.value.status, error.value.code) == (503, "deadline_exceeded")
    assert late.attempts == []


def test_a_silent_replica_is_given_up_at_the_deadline(
    run: Callable[..., str], engine: ContinuousEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience: list[float] = []
    patience_s = Prepared.patience_s

    def ends_soon(prepared: Prepared) -> float:
        patience.append(patience_s(prepared))
        return 0.1

    monkeypatch.setattr(Prepared, "patience_s", ends_soon)
    client = Failing(engine, None)
    with pytest.raises(ApiError) as error:
        run(client, timeout_s=2 * PATIENCE_S, arrived_s=PATIENCE_S)
    assert (error.value.status, error.value.code) == (503, "deadline_exceeded")
    assert len(client.attempts) == 1, "it was tried, and no other replica after it"
    assert patience[0] <= PATIENCE_S, "it is the rest of the time limit, which is that of all attempts together"


class Reference:
    """A reference to the result of a call of an actor."""

    def __init__(self, actor: str) -> None:
        self._actor = actor

    def task_id(self) -> Any:
        return SimpleNamespace(actor_id=lambda: SimpleNamespace(hex=lambda: self._actor))


class Call:
    """A call to a replica, plain or streaming, that gets no event; or the result of one, for Serve's handle."""

    def __init__(self, actor: str, *, answers: bool = False, accepted: bool = True) -> None:
        self.cancelled = False
        self._replica_result = self if accepted else None
        self._obj_ref, self._obj_ref_gen = Reference(actor), None
        self._answers = answers

    def cancel(self) -> None:
        self.cancelled = True

    async def get_async(self) -> None:
        if not self._answers:
            await asyncio.Event().wait()

    async def to_object_ref_async(self) -> Reference:
        return self._obj_ref

    def __await__(self) -> Any:
        return self.get_async().__await__()

    async def __anext__(self) -> None:
        await self


class Replicas:
    """A handle of two replicas, whose requests get no answer, and of which some respond to a check."""

    def __init__(self, *responding: str, accepting: str = "ab") -> None:
        self.calls: dict[str, Call] = {}
        self._responding = responding
        self._accepting = accepting
        self._names = iter("ab")

    @property
    def answer(self) -> "Replicas":
        return self

    events = answer

    def options(self, **_: object) -> "Replicas":
        return self

    def remote(self, _: object) -> Call:
        name = next(self._names)
        self.calls[name] = Call(name, accepted=name in self._accepting)
        return self.calls[name]

    def broadcast(self, method: str) -> Any:
        async def results() -> list[Call]:
            return [Call(name, answers=name in self._responding) for name in "ab"]

        assert method == "stats", "which needs no model"
        return SimpleNamespace(_fetch_replica_results_async=results)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("responding", "accepting", "lost"),
    # A hung replica does not even accept a request.
    [("b", "ab", ["a"]), ("b", "b", ["a"]), ("ab", "ab", []), ("ab", "", []), ("", "ab", [])],
)
def test_requests_leave_a_replica_that_does_not_respond_while_another_does(
    samples: list[Sample],
    ask: Asker,
    monkeypatch: pytest.MonkeyPatch,
    stream: bool,
    responding: str,
    accepting: str,
    lost: list[str],
) -> None:
    """A long answer alone is no reason, and without another replica a retry cannot help."""
    monkeypatch.setattr(clients, "_SILENT_S", 0.05)
    replicas = Replicas(*responding, accepting=accepting)
    client = HandleClient(cast("DeploymentHandle[Any]", replicas))

    async def run() -> list[str]:
        tasks = [asyncio.ensure_future(last_event(client.events(ask(samples[0], 16, stream=stream)))) for _ in "ab"]
        await asyncio.sleep(0.1)
        assert await client.release_silent() == len(lost)
        await asyncio.sleep(0)
        done, waiting = await asyncio.wait(tasks, timeout=0.1)
        for task in waiting:
            task.cancel()
        return [name for name, task in zip("ab", tasks, strict=True) if task in done and _is_lost(task)]

    def _is_lost(task: "asyncio.Future[Any]") -> bool:
        return isinstance(task.exception(), ReplicaLost)

    assert asyncio.run(run()) == lost
    assert all(replicas.calls[name].cancelled for name in lost), "the replica does not answer it later"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (RayTaskError("events", "trace", ValueError("a path")), "engine_error"),
        (BackPressureError(num_queued_requests=1, max_queued_requests=1), "queue_full"),
        (RayActorError(), None),
    ],
)
def test_an_exception_of_ray_is_translated(
    samples: list[Sample], ask: Asker, stream: bool, raised: Exception, code: str | None
) -> None:
    cancelled: list[bool] = []

    class Response:
        def __aiter__(self) -> "Response":
            return self

        async def __anext__(self) -> None:
            raise raised

        def __await__(self) -> Any:
            raise raised
            yield

        def cancel(self) -> None:
            cancelled.append(True)

    class Handle:
        def options(self, **_: object) -> "Handle":
            return self

        @property
        def events(self) -> "Handle":
            return self

        @property
        def answer(self) -> "Handle":
            return self

        def remote(self, _: object) -> Response:
            return Response()

    client = HandleClient(cast("DeploymentHandle[Any]", Handle()))
    with pytest.raises(ReplicaLost if code is None else EngineRefusal) as refusal:
        asyncio.run(last_event(client.events(ask(samples[0], 16, stream=stream))))
    if code is not None:
        assert cast(EngineRefusal, refusal.value).code == code
        assert "path" not in str(refusal.value)
    assert cancelled == [True] * stream
