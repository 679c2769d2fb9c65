"""The ingress on Ray Serve: accepts HTTP requests and holds no model.

The model versions come as user configuration, so that they can change while requests are in flight: the new version
must answer a probe first, and only then gets requests. Serve also imports this module where it only builds the
application, so the processor's libraries are imported when a version is loaded.
"""

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.exceptions import RayError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from parcelray.config.base import StrictModel
from parcelray.config.identity import identity
from parcelray.config.serve import ServeJob
from parcelray.profiling.backbone_shapes import from_transformers_config
from parcelray.serving.engine.engine import EngineRefusal, PromptBuilder
from parcelray.serving.http.api import Api
from parcelray.serving.http.auth import ApiKey, Gatekeeper
from parcelray.serving.http.images import ImageReader
from parcelray.serving.ingress.budget_policy import BudgetPolicy
from parcelray.serving.ingress.chat import Admission, ChatService
from parcelray.serving.ingress.clients import HandleClient, ReplicaLost
from parcelray.serving.ingress.metrics import EndpointMetrics
from parcelray.serving.ingress.notices import LostRecords, Notices
from parcelray.serving.ingress.request_log import RequestLog, RequestSampler
from parcelray.serving.ingress.routes import Records, Route, Routes
from parcelray.serving.replica import ReplicaSettings
from parcelray.tracking.opening import settings_folder

if TYPE_CHECKING:
    from parcelray.profiling.reduction_flops import PrefillCost
    from parcelray.tracking.request_samples import RequestSamples

logger = logging.getLogger("ray.serve")
MODEL_DEPLOYMENT = "Model"
"""Name of the deployment in each model's application."""
_STATS_PERIOD_S = 1.0
_STATS_TIMEOUT_S = 5.0


class RouteSettings(StrictModel):
    """One version of the model in the user configuration."""

    app: str
    """Serve application that runs it."""
    settings: ReplicaSettings
    """Settings of its replicas."""


class IngressRoutes(StrictModel):
    """The user configuration of the ingress."""

    champion: RouteSettings
    challenger: RouteSettings | None = None
    keys: tuple[ApiKey, ...] = ()
    """The API keys, as hashes: the ingress may run on another host than the keys file. Empty: no key is needed."""


@dataclass(frozen=True)
class _Shared:
    """The parts of a chat service that are kept when the routes change."""

    policy: BudgetPolicy
    metrics: EndpointMetrics
    admission: Admission
    images: ImageReader
    log: RequestLog
    records: Records


class Ingress:
    """The class that Serve creates ingress replicas of.

    Args:
        job: the job of the endpoint.
    """

    def __init__(self, job: ServeJob) -> None:
        logging.getLogger("parcelray").setLevel(logging.INFO)
        for handler in logger.handlers:
            logging.getLogger("parcelray").addHandler(handler)
        self._job = job
        capacity = (job.engine.max_running + job.engine.max_waiting) * job.replicas.max
        metrics = EndpointMetrics(job.name)
        self._notices = Notices()
        self._lost_records = LostRecords(logger.handlers, metrics.log_records_dropped)
        self._store = _sample_store(job, metrics)
        self._shared = _Shared(
            policy=BudgetPolicy(job.budgets),
            metrics=metrics,
            admission=Admission(capacity),
            images=ImageReader(job.limits, job.http),
            log=RequestLog(
                RequestSampler(job.samples, self._store.put)
                if job.samples is not None and self._store is not None
                else None
            ),
            records=Records(),
        )
        self._gatekeeper = Gatekeeper([])
        self._service: ChatService | None = None
        self._polling: asyncio.Future[Any] | None = None

    def __del__(self) -> None:
        """Called by Serve after the requests in flight have ended."""
        if (store := getattr(self, "_store", None)) is not None:
            store.close()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Serve after the first `reconfigure`."""
        api = Api(self._job.name, self._job.http, self._current, self._gatekeeper, self._shared.log)
        return LostProxies(api.application())

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Called by Serve at the start and on every change of routes; requests in flight keep their chat service."""
        settings = IngressRoutes.model_validate(user_config)
        # Without any key, every request would be admitted.
        assert settings.keys or self._job.http.keys_file is None, "`pin` reads the keys file"
        self._gatekeeper.replace(list(settings.keys))
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
        if self._polling is None:
            self._polling = asyncio.gather(self._poll_stats(), self._watch_replicas(), self._watch_log())
        logger.info("parcelray: requests go to %s", ", ".join(route.version for route in self._service.routes.all))

    async def _poll_stats(self) -> None:
        """Polls the statistics of any replica of each version; over time this also covers replicas without requests."""
        while True:
            await asyncio.sleep(_STATS_PERIOD_S)
            for route in self._current().routes.all:
                # A replica that does not respond is polled again later.
                with contextlib.suppress(ReplicaLost, EngineRefusal, TimeoutError):
                    self._shared.metrics.update(await asyncio.wait_for(route.client.stats(), _STATS_TIMEOUT_S))

    async def _watch_replicas(self) -> None:
        """Sends requests that wait for a hung replica to another one."""
        while True:
            await asyncio.sleep(_STATS_PERIOD_S)
            for route in self._current().routes.all:
                if lost := await route.client.release_silent():
                    self._notices.add(f"{lost} requests waited for a model replica that does not respond; retried.")

    async def _watch_log(self) -> None:
        """Reports lost records of the log as soon as it can be written again."""
        while True:
            await asyncio.sleep(_STATS_PERIOD_S)
            if (sentence := self._lost_records.report()) is not None:
                self._notices.add(sentence)

    async def notices(self) -> list[str]:
        """Returns the sentences for the operator that `parcelray serve` has not printed yet."""
        return self._notices.take()

    def _current(self) -> ChatService:
        assert self._service is not None, "Serve calls `reconfigure` before it sends requests"
        return self._service

    async def _route(self, route: RouteSettings) -> Route:
        client = HandleClient(serve.get_deployment_handle(MODEL_DEPLOYMENT, route.app))
        prompts, costs = await asyncio.to_thread(_load_prompts_and_costs, route.settings)
        # A version that does not answer gets no requests.
        await client.ping()
        reducer = route.settings.reducer
        return Route(route.settings.model.reference, client, prompts, costs, app=route.app, reducer=reducer)


class LostProxies:
    """ASGI middleware that treats the death of the proxy of a request as the disconnection of its client.

    Serve raises an exception of Ray instead, which would be an unexpected error with a traceback for each request.

    Args:
        app: the application of the ingress.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""

        async def receive_or_disconnect() -> Message:
            try:
                return await receive()
            except RayError:
                logger.warning("parcelray: the proxy of a request was lost")
                return {"type": "http.disconnect"}

        await self._app(scope, receive_or_disconnect, send)


def _sample_store(job: ServeJob, metrics: EndpointMetrics) -> "RequestSamples | None":
    if job.samples is None:
        return None
    # Importing MLflow takes seconds, and most endpoints keep no samples.
    from parcelray.tracking.request_samples import RequestSamples

    assert job.tracking.uri is not None, "checked by `ServeJob`"
    return RequestSamples(job.tracking.uri, job.tracking.experiment, identity(job), metrics.samples_dropped)


def _load_prompts_and_costs(settings: ReplicaSettings) -> tuple[PromptBuilder, "dict[int, PrefillCost]"]:
    from parcelray.models.vlm import config_of, load_processor
    from parcelray.profiling.reduction_flops import prefill_costs

    folder = settings_folder(settings.pin, logger.info)
    config = config_of(folder)
    connector = settings.model.connector or config.connector_config
    costs = prefill_costs(from_transformers_config(config), connector, settings.reducer, settings.budgets)
    return PromptBuilder(load_processor(folder)), costs
