"""One copy of a model on Ray Serve: loads, warms up every budget, and is healthy as long as an answer comes through its own request path."""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import torch
from pydantic import TypeAdapter
from ray import serve

from parcelray.config.base import StrictModel
from parcelray.config.connector import ConnectorConfig
from parcelray.config.serve import EngineConfig
from parcelray.errors import UnsupportedBudgetError
from parcelray.models.backbones import ElasticVLM
from parcelray.models.processor import load_processor
from parcelray.models.vlm import load_vlm, use_sdpa_where_exact
from parcelray.serving.continuous_engine import ContinuousEngine, EngineLimits
from parcelray.serving.engine import EngineRefusal, EngineStats, Failed, Finished, GenerateRequest, ImagePixels, Inspection, Piece, Sampling
from parcelray.serving.prompting import PromptBuilder
from parcelray.serving.waiting import answer, answer_all, events

logger = logging.getLogger("ray.serve")
_PING_TIMEOUT_S = 20.0
"""A replica that makes no token in this time is replaced."""
_WARM_UP_TIMEOUT_S = 600.0


class ReplicaSettings(StrictModel):
    """All that a replica is made from."""

    path: str
    """Folder of the checkpoint, on every node."""
    version: str
    """Pinned reference: what the folder holds."""
    connector: str | None
    """JSON of a connector without weights to put in; null: the checkpoint's own."""
    dtype: str
    """Arithmetic of the model."""
    device: str
    """Where it runs."""
    budgets: tuple[int, ...]
    """To warm up."""
    engine: EngineConfig
    """What it holds at the same time."""
    threads: int | None
    """Of the arithmetic on a CPU; null: torch's choice."""


def load_model(settings: ReplicaSettings) -> ElasticVLM:
    """The model of a replica, in evaluation mode on its device.

    Raises:
        UnsupportedBudgetError: it cannot give an offered budget.
        UserError: the checkpoint cannot be loaded.
    """
    connector: ConnectorConfig | None = TypeAdapter(ConnectorConfig).validate_json(settings.connector) if settings.connector else None
    model = load_vlm(settings.path, connector=connector, dtype=getattr(torch, settings.dtype))
    for budget in settings.budgets:
        if budget not in model.supported_budgets:
            raise UnsupportedBudgetError(budget, model.supported_budgets, model.connector.name)
    use_sdpa_where_exact(model)
    return model.to(settings.device).eval()


def limits_of(config: EngineConfig) -> EngineLimits:
    """An engine's limits out of a job."""
    return EngineLimits(
        max_running=config.max_running,
        max_waiting=config.max_waiting,
        kv_tokens=config.kv_tokens,
        prefill_tokens=config.prefill_tokens,
        vision_batch=config.vision_batch,
        feature_cache_bytes=config.feature_cache_mb * 1024**2,
    )


class ModelReplica:
    """The class that Serve makes replicas of.

    Args:
        settings: of the model.
    """

    def __init__(self, settings: ReplicaSettings) -> None:
        started = time.perf_counter()
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        model = load_model(settings)
        processor = load_processor(settings.path)
        logger.info("parcelray: model loaded in %.1f s", time.perf_counter() - started)
        self._prompts = PromptBuilder(processor)
        self._numbers = itertools.count()
        self._engine = ContinuousEngine(model, processor, limits_of(settings.engine), name=serve.get_replica_context().replica_id.unique_id)
        self._warm_up(settings.budgets)
        self._load_s = time.perf_counter() - started
        logger.info("parcelray: ready after %.1f s", self._load_s)

    async def answer(self, request: GenerateRequest) -> Finished | Failed:
        """The whole answer. A refusal is a value: as an exception Ray would wrap it on the way."""
        try:
            return await answer(self._engine, request)
        except EngineRefusal as refusal:
            return Failed(refusal)

    async def events(self, request: GenerateRequest) -> AsyncIterator[Piece | Finished | Failed]:
        """The answer in pieces."""
        try:
            async for event in events(self._engine, request):
                yield event
        except EngineRefusal as refusal:
            yield Failed(refusal)

    async def inspect(self, image: ImagePixels, num_visual_tokens: int) -> Inspection:
        """See `Engine.inspect`."""
        return await asyncio.wrap_future(self._engine.inspect(image, num_visual_tokens))

    async def stats(self) -> EngineStats:
        """See `Engine.stats`; asked aside from answers, so that an idle replica is known, too."""
        return replace(self._engine.stats(), load_s=self._load_s)

    async def ping(self) -> None:
        """Makes one token through the queue, the prefill and the decoder, like any request."""
        await answer(self._engine, self._probe(0, (), 1, _PING_TIMEOUT_S))

    async def check_health(self) -> None:
        """Called by Serve; an exception replaces the replica."""
        await self.ping()

    def __del__(self) -> None:
        """Called by Serve after the requests in flight have ended, or had their time."""
        if hasattr(self, "_engine"):
            self._engine.close()

    def _warm_up(self, budgets: tuple[int, ...]) -> None:
        for budget in budgets:
            started = time.perf_counter()
            side = self._prompts.image_size
            # Different images, so that none is in the cache, and so many that a batch is one, too.
            images = [ImagePixels(f"warm-up-{budget}-{number}", side, bytes([64 * number]) * (3 * side * side)) for number in range(3)]
            answer_all(self._engine, [self._probe(budget, (image,), 4, _WARM_UP_TIMEOUT_S) for image in images])
            logger.info("parcelray: %d visual tokens warmed up in %.2f s", budget, time.perf_counter() - started)

    def _probe(self, budget: int, images: tuple[ImagePixels, ...], max_new_tokens: int, timeout_s: float) -> GenerateRequest:
        sampling = Sampling(max_new_tokens=max_new_tokens)
        name = f"probe-{next(self._numbers)}"
        return self._prompts.request(name, "ready", images, num_visual_tokens=budget, sampling=sampling, timeout_s=timeout_s, urgent=True)
