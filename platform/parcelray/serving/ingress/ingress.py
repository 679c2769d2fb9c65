"""The ingress on Ray Serve: takes requests and has no model.

Which models there are comes as user configuration, so that it can change while requests are in flight: the new version
must answer first, and only then does the next request go to it. Serve loads this module, too, where it only builds the
application, so the processor's libraries are imported where a version is described.
"""

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter
from ray import serve
from starlette.types import ASGIApp

from parcelray.config.base import StrictModel
from parcelray.config.connector import ConnectorConfig
from parcelray.config.loader import identity
from parcelray.config.serve import ServeJob
from parcelray.profiling.backbone_shapes import from_transformers_config
from parcelray.profiling.flops import CostBreakdown, cost
from parcelray.serving.engine.engine import EngineRefusal
from parcelray.serving.http.api import Api
from parcelray.serving.http.auth import ApiKey, Gatekeeper, read_keys
from parcelray.serving.http.images import ImageReader
from parcelray.serving.ingress.admission import Admission
from parcelray.serving.ingress.budget_policy import BudgetPolicy
from parcelray.serving.ingress.chat import ChatService
from parcelray.serving.ingress.clients import ReplicaLost
from parcelray.serving.ingress.handle_client import HandleClient
from parcelray.serving.ingress.metrics import EndpointMetrics
from parcelray.serving.ingress.prompting import PromptBuilder
from parcelray.serving.ingress.request_log import RequestLog
from parcelray.serving.ingress.request_samples import RequestSampler
from parcelray.serving.ingress.routes import Records, Route, Routes

if TYPE_CHECKING:
    from parcelray.tracking.request_samples import RequestSamples

logger = logging.getLogger("ray.serve")
MODEL_DEPLOYMENT = "Model"
"""Name of the deployment in each model's application."""
_STATS_PERIOD_S = 1.0
_STATS_TIMEOUT_S = 5.0


class RouteSettings(StrictModel):
    """One version of the model, as the user configuration names it."""

    app: str
    """Application on Serve that runs it."""
    version: str
    """Pinned reference."""
    path: str
    """Folder of the checkpoint, for its processor and configuration."""
    connector: str | None = None
    """JSON of a connector put into it."""


class IngressRoutes(StrictModel):
    """The user configuration."""

    champion: RouteSettings
    challenger: RouteSettings | None = None
    keys: str | None = None
    """Hash of the keys file: a change of it makes the ingress read the file again."""


@dataclass(frozen=True)
class _Shared:
    """What outlives a change of routes."""

    policy: BudgetPolicy
    metrics: EndpointMetrics
    admission: Admission
    images: ImageReader
    log: RequestLog
    records: Records


class Ingress:
    """The class that Serve makes ingress replicas of.

    Args:
        job: JSON of the endpoint's job.
    """

    def __init__(self, job: str) -> None:
        logging.getLogger("parcelray").setLevel(logging.INFO)
        for handler in logger.handlers:
            logging.getLogger("parcelray").addHandler(handler)
        self._job = ServeJob.model_validate_json(job)
        replicas = self._job.replicas.max
        capacity = (self._job.engine.max_running + self._job.engine.max_waiting) * replicas
        metrics = EndpointMetrics(self._job.name)
        self._store = _sample_store(self._job, metrics)
        self._shared = _Shared(
            policy=BudgetPolicy(self._job.budgets),
            metrics=metrics,
            admission=Admission(capacity),
            images=ImageReader(self._job.limits, self._job.http),
            log=RequestLog(
                RequestSampler(self._job.samples, self._store.put)
                if self._job.samples is not None and self._store is not None
                else None
            ),
            records=Records(),
        )
        self._gatekeeper = Gatekeeper(self._keys())
        self._service: ChatService | None = None
        self._watching: asyncio.Task[None] | None = None

    def __del__(self) -> None:
        """Called by Serve after the requests in flight have ended."""
        if (store := getattr(self, "_store", None)) is not None:
            store.close()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Serve once the routes are known."""
        return Api(self._job.name, self._job.http, self._current, self._gatekeeper, self._shared.log).application()

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Called by Serve at the start and whenever the routes change; requests in flight keep the service they began with."""
        settings = IngressRoutes.model_validate(user_config)
        self._gatekeeper.replace(self._keys())
        champion = await self._route(settings.champion)
        challenger = await self._route(settings.challenger) if settings.challenger is not None else None
        canary = self._job.canary
        if challenger is not None and canary is not None:
            challenger.share = canary.share
        shared = self._shared
        self._service = ChatService(
            routes=Routes(champion, challenger, canary, records=shared.records),
            limits=self._job.limits,
            policy=shared.policy,
            metrics=shared.metrics,
            admission=shared.admission,
            images=shared.images,
            log=shared.log,
        )
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())
        logger.info("parcelray: requests go to %s", ", ".join(route.version for route in self._service.routes.all))

    async def _watch(self) -> None:
        """Asks a replica of each version what it does, any of them: with time all, so that those without requests are known, too."""
        while True:
            await asyncio.sleep(_STATS_PERIOD_S)
            for route in self._current().routes.all:
                # A replica that cannot be asked now is asked again.
                with contextlib.suppress(ReplicaLost, EngineRefusal, TimeoutError):
                    self._shared.metrics.heard(await asyncio.wait_for(route.client.stats(), _STATS_TIMEOUT_S))

    def _keys(self) -> list[ApiKey]:
        file = self._job.http.keys_file
        return read_keys(Path(file)) if file else []

    def _current(self) -> ChatService:
        assert self._service is not None, "Serve configures before it serves"
        return self._service

    async def _route(self, settings: RouteSettings) -> Route:
        client = HandleClient(serve.get_deployment_handle(MODEL_DEPLOYMENT, settings.app))
        prompts, costs = await asyncio.to_thread(_describe, settings, self._job.budgets.offered)
        # A version that does not answer gets no request.
        await client.ping()
        return Route(settings.version, client, prompts, costs, app=settings.app)


def _sample_store(job: ServeJob, metrics: EndpointMetrics) -> "RequestSamples | None":
    if job.samples is None:
        return None
    # MLflow takes seconds to load, and most endpoints keep no samples.
    from parcelray.tracking.request_samples import RequestSamples

    assert job.tracking.uri is not None
    return RequestSamples(job.tracking.uri, job.tracking.experiment, identity(job), metrics.samples_dropped)


def _describe(settings: RouteSettings, budgets: tuple[int, ...]) -> tuple[PromptBuilder, dict[int, CostBreakdown]]:
    from parcelray.models.processor import load_processor
    from parcelray.models.vlm import config_of

    config = config_of(settings.path)
    connector: ConnectorConfig = (
        TypeAdapter(ConnectorConfig).validate_json(settings.connector)
        if settings.connector
        else config.connector_config
    )
    shape = from_transformers_config(config)
    return PromptBuilder(load_processor(settings.path)), {budget: cost(shape, connector, budget) for budget in budgets}
