"""How the ingress reaches a model: over a Ray Serve handle, or in its own process (tests, and the bench's yardstick)."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Protocol

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from parcelray.serving.engine import Engine, EngineRefusal, Failed, Finished, GenerateRequest, ImagePixels, Inspection, Piece
from parcelray.serving.waiting import answer, events


class ReplicaLost(Exception):
    """The replica that had the request is gone."""


class ModelClient(Protocol):
    """One version of a model."""

    async def answer(self, request: GenerateRequest) -> Finished:
        """The whole answer; cancelling the wait cancels the request.

        Raises:
            EngineRefusal: it was refused or given up.
            ReplicaLost: the replica died.
        """
        ...

    def events(self, request: GenerateRequest) -> AsyncIterator[Piece | Finished]:
        """The answer in pieces; raises as `answer` does."""
        ...

    async def inspect(self, image: ImagePixels, num_visual_tokens: int) -> Inspection:
        """See `Inspection`."""
        ...

    async def ping(self) -> None:
        """Returns once an answer came through the same path as requests take."""
        ...


class HandleClient:
    """A model in deployments of Ray Serve.

    Args:
        handle: of the model's deployment.
    """

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._streams = handle.options(stream=True)

    async def answer(self, request: GenerateRequest) -> Finished:
        """See `ModelClient`."""
        end: Finished | Failed = await self._call(self._handle.answer.remote(request))
        return _checked(end)

    async def events(self, request: GenerateRequest) -> AsyncIterator[Piece | Finished]:
        """See `ModelClient`."""
        response: Any = self._streams.events.remote(request)
        ended = False
        try:
            async for event in response:
                ended = not isinstance(event, Piece)
                yield event if isinstance(event, Piece) else _checked(event)
        except (RayActorError, DeploymentUnavailableError):
            raise ReplicaLost from None
        except BackPressureError:
            raise _full() from None
        finally:
            if not ended:
                response.cancel()

    async def inspect(self, image: ImagePixels, num_visual_tokens: int) -> Inspection:
        """See `ModelClient`."""
        found: Inspection = await self._call(self._handle.inspect.remote(image, num_visual_tokens))
        return found

    async def ping(self) -> None:
        """See `ModelClient`."""
        await self._call(self._handle.ping.remote())

    async def _call(self, response: Any) -> Any:
        try:
            return await response
        except asyncio.CancelledError:
            # Serve cancels what a request has started, but now and then it misses one (ray#52533).
            response.cancel()
            raise
        except (RayActorError, DeploymentUnavailableError):
            raise ReplicaLost from None
        except BackPressureError:
            raise _full() from None
        except RayTaskError:
            raise EngineRefusal("engine_error", "The replica failed on this request; send it again.") from None


class LocalClient:
    """A model in this process.

    Args:
        engine: already running.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def answer(self, request: GenerateRequest) -> Finished:
        """See `ModelClient`."""
        return await answer(self._engine, request)

    def events(self, request: GenerateRequest) -> AsyncIterator[Piece | Finished]:
        """See `ModelClient`."""
        return events(self._engine, request)

    async def inspect(self, image: ImagePixels, num_visual_tokens: int) -> Inspection:
        """See `ModelClient`."""
        return await asyncio.wrap_future(self._engine.inspect(image, num_visual_tokens))

    async def ping(self) -> None:
        """See `ModelClient`: an engine that runs in this process has no path of its own."""


def _checked(end: Finished | Failed) -> Finished:
    if isinstance(end, Failed):
        raise end.refusal
    return end


def _full() -> EngineRefusal:
    return EngineRefusal("queue_full", "Every replica has as many requests as it can hold; send the request again later.")
