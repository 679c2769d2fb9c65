"""One replica of a model on Ray Serve: loads the model, warms up every budget, and checks its own health.

Serve also imports this module where it only builds the application, so `load`, which imports the model's libraries, is
imported when a replica starts.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from ray import serve

from parcelray.serving.engine.engine import (
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
from parcelray.serving.replica import ReplicaSettings

logger = logging.getLogger("ray.serve")
_REFUSAL_PAUSE_S = 0.5
"""Delay of a refusal by a broken replica.

Without it, a broken replica would always look idle, and the router would send it the requests of the healthy ones.
"""


class ModelReplica:
    """The class that Serve creates replicas of.

    Args:
        settings: settings of the replica.
    """

    def __init__(self, settings: ReplicaSettings) -> None:
        started = time.perf_counter()
        from parcelray.serving.replica.load import load_engine

        self._engine, self._probe = load_engine(settings, serve.get_replica_context().replica_id.unique_id)
        self._load_s = time.perf_counter() - started
        logger.info("parcelray: ready after %.1f s", self._load_s)

    async def events(self, request: GenerateRequest) -> AsyncGenerator[Piece | Finished | Failed, None]:
        """Yields the events of a request. A refusal is an event: Ray would wrap it if it were raised."""
        try:
            async with aclosing(events(self._engine, request)) as stream:
                async for event in stream:
                    yield event
        except EngineRefusal as refusal:
            if refusal.code in ("engine_error", "shutting_down"):
                await asyncio.sleep(_REFUSAL_PAUSE_S)
            yield Failed(refusal)

    async def answer(self, request: GenerateRequest) -> Finished | Failed:
        """Returns the last event of a request that is not streamed; a plain call is cheaper than a streaming one."""
        async with aclosing(self.events(request)) as stream:
            async for event in stream:
                if not isinstance(event, Piece):
                    return event
        raise AssertionError("a stream of events ended without a last event")

    async def inspect(self, image: ImagePixels, num_visual_tokens: int) -> Inspection:
        """See `Engine.inspect`."""
        return await asyncio.wrap_future(self._engine.inspect(image, num_visual_tokens))

    async def stats(self) -> EngineStats:
        """Returns `Engine.stats`; the ingress polls it, so that idle replicas are known too."""
        return replace(self._engine.stats(), load_s=self._load_s)

    async def ping(self) -> None:
        """Generates one token through the queue, the vision tower, the connector and the decoder, like any request."""
        await self._probe.check(self._engine)

    async def check_health(self) -> None:
        """Called by Serve periodically; an exception makes Serve replace the replica."""
        await self.ping()

    def __del__(self) -> None:
        """Called by Serve after the requests in flight have ended or timed out."""
        if hasattr(self, "_engine"):
            self._engine.close()
