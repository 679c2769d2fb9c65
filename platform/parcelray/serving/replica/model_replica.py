"""One copy of a model on Ray Serve: loads, warms up every budget, and is healthy as long as an answer comes through its own request path.

Serve loads this module, too, where it only builds the application, so the model and its libraries are imported where a
replica begins.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
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
)
from parcelray.serving.engine.waiting import answer, events
from parcelray.serving.replica.replica_settings import ReplicaSettings

logger = logging.getLogger("ray.serve")
_REFUSAL_PAUSE_S = 0.5
"""A broken replica that refused at once would always look idle, and the router would send it what the others could answer."""


class ModelReplica:
    """The class that Serve makes replicas of.

    Args:
        settings: of the model.
    """

    def __init__(self, settings: ReplicaSettings) -> None:
        started = time.perf_counter()
        from parcelray.serving.replica.replica_loading import load_engine

        self._engine, self._probe = load_engine(settings, serve.get_replica_context().replica_id.unique_id)
        self._load_s = time.perf_counter() - started
        logger.info("parcelray: ready after %.1f s", self._load_s)

    async def answer(self, request: GenerateRequest) -> Finished | Failed:
        """The whole answer. A refusal is a value: as an exception Ray would wrap it on the way."""
        try:
            return await answer(self._engine, request)
        except EngineRefusal as refusal:
            await _pause(refusal)
            return Failed(refusal)

    async def events(self, request: GenerateRequest) -> AsyncIterator[Piece | Finished | Failed]:
        """The answer in pieces."""
        try:
            async for event in events(self._engine, request):
                yield event
        except EngineRefusal as refusal:
            await _pause(refusal)
            yield Failed(refusal)

    async def inspect(self, image: ImagePixels, num_visual_tokens: int) -> Inspection:
        """See `Engine.inspect`."""
        return await asyncio.wrap_future(self._engine.inspect(image, num_visual_tokens))

    async def stats(self) -> EngineStats:
        """See `Engine.stats`; asked aside from answers, so that an idle replica is known, too."""
        return replace(self._engine.stats(), load_s=self._load_s)

    async def ping(self) -> None:
        """Makes one token through the queue, the vision tower, the connector and the decoder, like any request."""
        await self._probe.check(self._engine)

    async def check_health(self) -> None:
        """Called by Serve; an exception replaces the replica."""
        await self.ping()

    def __del__(self) -> None:
        """Called by Serve after the requests in flight have ended, or had their time."""
        if hasattr(self, "_engine"):
            self._engine.close()


async def _pause(refusal: EngineRefusal) -> None:
    if refusal.code in ("engine_error", "shutting_down"):
        await asyncio.sleep(_REFUSAL_PAUSE_S)
