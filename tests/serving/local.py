"""An endpoint without Ray: the same ASGI application over an engine in this process, on a local HTTP server."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from parcelray.config.serve import ServeJob
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.profiling.backbone_shapes import from_transformers_config
from parcelray.profiling.reduction_flops import prefill_costs
from parcelray.serving.engine.budget_chooser import BudgetChooser
from parcelray.serving.engine.continuous_engine import ContinuousEngine
from parcelray.serving.engine.engine import Engine, PromptBuilder
from parcelray.serving.http.api import Api
from parcelray.serving.http.auth import ApiKey, Gatekeeper
from parcelray.serving.http.images import ImageReader
from parcelray.serving.ingress.budget_policy import BudgetPolicy
from parcelray.serving.ingress.chat import Admission, ChatService
from parcelray.serving.ingress.clients import LocalClient, ModelClient
from parcelray.serving.ingress.metrics import EndpointMetrics
from parcelray.serving.ingress.request_log import RequestLog
from parcelray.serving.ingress.routes import Route, Routes

VERSION = "models:/mini/7"
PATIENCE_S = 300.0
"""Limit of every wait in these tests, seconds; long enough for a busy machine, so only a hang reaches it."""

PATIENT = {"timeout_s": PATIENCE_S, "body_timeout_s": PATIENCE_S}
"""Limits of an endpoint that do not expire on a busy machine."""


def wait_until(condition: Callable[[], object], what: object = "the condition") -> None:
    """Waits until the condition holds."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@contextmanager
def held(engine: Engine) -> Iterator[None]:
    """Pauses the engine, so that all requests submitted in the context arrive together."""
    resume = threading.Event()

    def wait() -> None:
        resume.wait()

    engine._commands.put(wait)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        resume.set()


def job_of(**changes: Any) -> ServeJob:
    model: dict[str, Any] = {} if "reducer" in changes else {"connector": {"type": "m3"}}
    return ServeJob.model_validate({"kind": "serve", "name": "mini", "model": model, **changes})


def service_of(
    job: ServeJob, model: ElasticVLM, processor: ElasticProcessor, client: ModelClient, *, capacity: int | None = None
) -> ChatService:
    shape = from_transformers_config(model.config)
    costs = prefill_costs(shape, model.config.connector_config, job.reducer, job.budgets.offered)
    return ChatService(
        routes=Routes(Route(VERSION, client, PromptBuilder(processor), costs, reducer=job.reducer)),
        limits=job.limits,
        policy=BudgetPolicy(job.budgets),
        metrics=EndpointMetrics(job.name),
        admission=Admission(job.engine.max_running + job.engine.max_waiting if capacity is None else capacity),
        images=ImageReader(job.limits, job.http),
        log=RequestLog(),
    )


@contextmanager
def endpoint(
    model: ElasticVLM,
    processor: ElasticProcessor,
    *,
    keys: list[ApiKey] | None = None,
    capacity: int | None = None,
    chooser: BudgetChooser | None = None,
    **changes: Any,
) -> Iterator[tuple[str, ChatService, ContinuousEngine]]:
    """Runs an endpoint and yields its URL, service and engine; its timeouts are long unless changed."""
    job = job_of(**{**changes, "limits": {**PATIENT, **changes.get("limits", {})}})
    engine = ContinuousEngine(model, processor, job.engine, chooser=chooser, reducer=job.reducer)
    service = service_of(job, model, processor, LocalClient(engine), capacity=capacity)
    api = Api(job.name, job.http, lambda: service, Gatekeeper(keys or []), RequestLog())
    with serving(api.application()) as url:
        yield url, service, engine
    engine.close()


@contextmanager
def serving(application: Any) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(
        uvicorn.Config(application, host="127.0.0.1", port=port, log_level="critical", timeout_graceful_shutdown=2)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()
