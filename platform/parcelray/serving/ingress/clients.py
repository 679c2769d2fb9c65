"""Access of the ingress to a model, over a handle of Ray Serve or in its own process; and the readiness probe."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any, Protocol

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from parcelray.serving.engine.engine import (
    Engine,
    EngineRefusal,
    EngineStats,
    Failed,
    Finished,
    GenerateRequest,
    ImagePixels,
    Inspection,
    Piece,
    events,
)
from parcelray.serving.http.api_errors import ApiError, from_refusal

_PROBE_TIMEOUT_S = 10.0
_PROBE_VALID_S = 1.0
"""Time for which the result of a readiness probe is reused, seconds."""
_SILENT_S = 5.0
"""Time without the first event of a request after which its replica is checked, and time limit of the check, seconds.

The check needs no model, only the event loop of the replica's process.
"""


class ReplicaLost(Exception):
    """The replica that handled the request was lost, or does not respond while others do."""


class ModelClient(Protocol):
    """Access to one version of a model."""

    def events(self, request: GenerateRequest) -> AsyncGenerator[Piece | Finished, None]:
        """Yields the events of a request: its pieces, if streamed, and its end. Closing it cancels the request.

        Raises:
            EngineRefusal: the request was rejected or aborted.
            ReplicaLost: the replica ended unexpectedly.
        """
        ...

    async def inspect(self, image: ImagePixels, num_visual_tokens: int) -> Inspection:
        """Returns the inspection of an image, see `Inspection`."""
        ...

    async def stats(self) -> EngineStats:
        """Returns the statistics of one of its replicas, chosen by the router."""
        ...

    async def ping(self) -> None:
        """Returns once an answer came through the path that requests take."""
        ...

    async def release_silent(self) -> int:
        """Ends the waiting requests, with `ReplicaLost`, whose replica does not respond; returns their number."""
        ...


class LocalClient:
    """A model in this process.

    Args:
        engine: a running engine.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def events(self, request: GenerateRequest) -> AsyncGenerator[Piece | Finished, None]:
        """See `ModelClient`."""
        return events(self._engine, request)

    async def inspect(self, image: ImagePixels, num_visual_tokens: int) -> Inspection:
        """See `ModelClient`."""
        return await asyncio.wrap_future(self._engine.inspect(image, num_visual_tokens))

    async def stats(self) -> EngineStats:
        """See `ModelClient`."""
        return self._engine.stats()

    async def ping(self) -> None:
        """See `ModelClient`; an engine in this process needs no probe."""

    async def release_silent(self) -> int:
        """See `ModelClient`; there is no other replica."""
        return 0


class HandleClient:
    """A model in deployments of Ray Serve.

    Args:
        handle: handle of the model's deployment.
    """

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._streams = handle.options(stream=True)
        self._waiting: dict[asyncio.Timeout, tuple[Any, float]] = {}
        """Calls without an event so far, with the time of their start, by the scope that ends the wait."""

    async def events(self, request: GenerateRequest) -> AsyncGenerator[Piece | Finished, None]:
        """See `ModelClient`."""
        if not request.stream:
            # A plain call: a streaming one takes 0.7 ms more, and with 16 clients the handle's rate falls by a fifth.
            response: Any = self._handle.answer.remote(request)
            async with self._waits(response):
                end = await self._call(response)
            yield _checked(end)
            return
        response = self._streams.events.remote(request)
        ended = False
        try:
            async with self._waits(response):
                event = await anext(response, None)
            while event is not None:
                ended = not isinstance(event, Piece)
                yield event if isinstance(event, Piece) else _checked(event)
                event = await anext(response, None)
        except (RayActorError, DeploymentUnavailableError, BackPressureError, RayTaskError) as error:
            raise _translated(error) from None
        finally:
            if not ended:
                response.cancel()

    async def inspect(self, image: ImagePixels, num_visual_tokens: int) -> Inspection:
        """See `ModelClient`."""
        inspection: Inspection = await self._call(self._handle.inspect.remote(image, num_visual_tokens))
        return inspection

    async def stats(self) -> EngineStats:
        """See `ModelClient`."""
        stats: EngineStats = await self._call(self._handle.stats.remote())
        return stats

    async def ping(self) -> None:
        """See `ModelClient`."""
        await self._call(self._handle.ping.remote())

    async def release_silent(self) -> int:
        """See `ModelClient`.

        Until its first event, a long answer looks like a hung replica. So the replicas are asked for their statistics,
        and only calls to those that are silent while another responds are ended.
        """
        due = {
            scope: response
            for scope, (response, started) in self._waiting.items()
            if monotonic() - started >= _SILENT_S
        }
        if not due:
            return 0
        if not (silent := await self._silent_replicas()):
            return 0
        # A call that has no replica yet waits for one to accept it, and the silent replica will not.
        held = {None, *silent}
        # The check took time, in which some of the calls may have got their first event.
        lost = [scope for scope in due if scope in self._waiting and _replica_of(due[scope]._replica_result) in held]
        for scope in lost:
            scope.reschedule(0.0)
        return len(lost)

    async def _silent_replicas(self) -> set[str | None]:
        """Returns the replicas that do not respond; none unless another responds, as a retry could not help then."""
        try:
            results = await self._handle.broadcast("stats")._fetch_replica_results_async()
        except (RayActorError, DeploymentUnavailableError):
            return set()
        checks = {asyncio.ensure_future(_answer(result)): _replica_of(result) for result in results}
        responding, silent = await asyncio.wait(checks, timeout=_SILENT_S)
        for check in silent:
            check.cancel()
        return {checks[check] for check in silent} if any(check.exception() is None for check in responding) else set()

    @asynccontextmanager
    async def _waits(self, response: Any) -> AsyncIterator[None]:
        """Lets `release_silent` end the wait for the first event of a call, which then raises `ReplicaLost`."""
        try:
            async with asyncio.timeout(None) as scope:
                self._waiting[scope] = (response, monotonic())
                try:
                    yield
                finally:
                    del self._waiting[scope]
        except TimeoutError:
            if not scope.expired():
                raise
            raise ReplicaLost from None

    async def _call(self, response: Any) -> Any:
        try:
            return await response
        except asyncio.CancelledError:
            # Serve cancels the calls that a request has started, but occasionally misses one (ray#52533).
            response.cancel()
            raise
        except (RayActorError, DeploymentUnavailableError, BackPressureError, RayTaskError) as error:
            raise _translated(error) from None


async def _answer(result: Any) -> None:
    await result.get_async()


def _replica_of(result: Any) -> str | None:
    """Returns the actor id of the replica that a call was assigned to, from Serve's result of it; None: not yet.

    Serve has no public function for this. The id of a call's task contains the id of its actor.
    """
    if result is None:
        return None
    generator = result._obj_ref_gen
    reference = result._obj_ref if generator is None else generator._generator_ref
    actor: str = reference.task_id().actor_id().hex()
    return actor


def _checked(end: Finished | Failed) -> Finished:
    if isinstance(end, Failed):
        raise end.refusal
    return end


def _translated(error: Exception) -> ReplicaLost | EngineRefusal:
    """Converts an exception of Ray into the error of the request."""
    if isinstance(error, RayActorError | DeploymentUnavailableError):
        return ReplicaLost()
    if isinstance(error, BackPressureError):
        return EngineRefusal(
            "queue_full", "All replicas hold their maximum number of requests; retry the request later."
        )
    return EngineRefusal("engine_error", "The replica failed on this request; retry the request.")


class Readiness:
    """Probes whether a model answers, through the path that requests take.

    Any client may request a probe, and it skips the queue. So there is one probe at a time, and its result is reused
    for a second.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._client: ModelClient | None = None
        self._probe: asyncio.Task[ApiError | None] | None = None
        self._ended = 0.0

    async def check(self, client: ModelClient) -> None:
        """Returns once the model has answered, or if it did within the last second.

        Raises:
            ApiError: the model does not answer.
        """
        if (
            self._probe is None
            or client is not self._client
            or (self._probe.done() and self._clock() - self._ended > _PROBE_VALID_S)
        ):
            self._client = client
            self._probe = asyncio.create_task(self._ping(client))
        # A client that disconnects must not cancel the probe of the others.
        refusal = await asyncio.shield(self._probe)
        if refusal is not None:
            raise ApiError(refusal.status, refusal.message, code=refusal.code, headers=refusal.headers)

    async def _ping(self, client: ModelClient) -> ApiError | None:
        try:
            await asyncio.wait_for(client.ping(), _PROBE_TIMEOUT_S)
        except (TimeoutError, ReplicaLost):
            return ApiError(503, "The model does not answer.", code="not_ready", headers={"retry-after": "1"})
        except EngineRefusal as refusal:
            return from_refusal(refusal, 1)
        finally:
            self._ended = self._clock()
        return None
