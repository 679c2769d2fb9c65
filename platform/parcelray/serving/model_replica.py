"""One copy of a model on Ray Serve: loads, warms up every budget, and is healthy as long as an answer comes through its own request path."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import torch
from pydantic import TypeAdapter
from ray import serve

from parcelray.config.base import StrictModel
from parcelray.config.budget_policy import InputPolicyConfig
from parcelray.config.connector import ConnectorConfig
from parcelray.config.serve import EngineConfig
from parcelray.errors import UnsupportedBudgetError
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.processor import load_processor
from parcelray.models.vlm import load_vlm, use_sdpa_where_exact
from parcelray.serving.budget_chooser import BudgetChooser, load_predictor
from parcelray.serving.engine import EngineRefusal, EngineStats, Failed, Finished, GenerateRequest, ImagePixels, Inspection, Piece
from parcelray.serving.engine_factory import build_engine
from parcelray.serving.health import HealthProbe
from parcelray.serving.prompting import PromptBuilder
from parcelray.serving.waiting import answer, events

logger = logging.getLogger("ray.serve")
_REFUSAL_PAUSE_S = 0.5
"""A broken replica that refused at once would always look idle, and the router would send it what the others could answer."""


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
    policy: InputPolicyConfig | None = None
    """How budgets are chosen that requests leave open to the replica; null: none are."""
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


def load_chooser(settings: ReplicaSettings, model: ElasticVLM, processor: ElasticProcessor) -> BudgetChooser | None:
    """The chooser of a replica; None: nothing is left open to it.

    Raises:
        UserError: there is no predictor, or it does not fit the model and its budgets.
    """
    if settings.policy is None:
        return None
    return BudgetChooser(load_predictor(settings.policy, settings.budgets), model, processor, price=settings.policy.price)


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
        probe = HealthProbe(PromptBuilder(processor), settings.budgets)
        chooser = load_chooser(settings, model, processor)
        name = serve.get_replica_context().replica_id.unique_id
        self._engine = build_engine(settings.engine, model, processor, name=name, chooser=chooser, urgent_tokens=probe.num_tokens)
        self._probe = probe
        probe.warm_up(self._engine)
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
