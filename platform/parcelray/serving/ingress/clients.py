"""How the endpoint reaches a model: here what it asks of it, and a model in its own process; `handle_client` has the one over Ray Serve."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Protocol

from parcelray.serving.engine.engine import (
    Engine,
    EngineStats,
    Finished,
    GenerateRequest,
    ImagePixels,
    Inspection,
    Piece,
)
from parcelray.serving.engine.waiting import answer, events


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

    def events(self, request: GenerateRequest) -> AsyncGenerator[Piece | Finished, None]:
        """The answer in pieces; raises as `answer` does."""
        ...

    async def inspect(self, image: ImagePixels, num_visual_tokens: int) -> Inspection:
        """See `Inspection`."""
        ...

    async def stats(self) -> EngineStats:
        """Of one of its replicas, any of them."""
        ...

    async def ping(self) -> None:
        """Returns once an answer came through the same path as requests take."""
        ...


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
        """See `ModelClient`: an engine that runs in this process has no path of its own."""
