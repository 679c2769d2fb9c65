"""The applications of an endpoint on Ray Serve, as a declarative configuration: one for each model version, one for the ingress.

`parcelray serve` deploys the same configuration that `parcelray serve --build` writes for `serve deploy`.
"""

import hashlib
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application

from parcelray.config.base import StrictModel
from parcelray.config.serve import InputPolicyConfig, ReplicasConfig, ServedModelConfig, ServeJob
from parcelray.models.checkpoint import ResolvedCheckpoint
from parcelray.serving.http.proxy_guard import proxy_environment
from parcelray.serving.ingress.ingress import MODEL_DEPLOYMENT, Ingress, IngressRoutes, RouteSettings
from parcelray.serving.replica.model_replica import ModelReplica
from parcelray.serving.replica.replica_settings import ReplicaSettings

INGRESS_DEPLOYMENT = "Ingress"
LOGGING = {"encoding": "JSON", "enable_access_log": False}
"""One line of JSON a record.

The endpoint's own record of a request says more than Serve's, which would add one in each of its three processes.
"""
PROXY_TIMEOUT_S = 300.0
"""Time for Serve's proxy to become ready on a busy machine, seconds."""
_PATIENCE = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": f"{PROXY_TIMEOUT_S / 3:.0f}"}
"""Serve replaces a proxy that is not ready at three checks of this length. By default a check takes 5 s, and on a busy
machine no proxy ever becomes ready."""
_HEALTH_RESERVE = 8
"""Calls beside requests that a replica takes: health checks, inspections."""
_DRAIN_S = 5.0
"""Beyond the longest request, before a replica that is to go is ended."""


class ModelAppArgs(StrictModel):
    """Arguments of `model_app`, as the configuration names them."""

    settings: ReplicaSettings
    replicas: ReplicasConfig
    longest_request_s: float


class IngressAppArgs(StrictModel):
    """Arguments of `ingress_app`."""

    job: ServeJob


def model_app(args: dict[str, Any]) -> Application:
    """The application of one model version; Serve calls it with the configuration's `args`."""
    parsed = ModelAppArgs.model_validate(args)
    replicas, engine = parsed.replicas, parsed.settings.engine
    deployment: Any = serve.deployment(
        name=MODEL_DEPLOYMENT,
        max_ongoing_requests=engine.max_running + engine.max_waiting + _HEALTH_RESERVE,
        max_queued_requests=max(1, engine.max_waiting),
        autoscaling_config={
            "min_replicas": replicas.min,
            "max_replicas": replicas.max,
            "target_ongoing_requests": replicas.target_ongoing,
            "upscale_delay_s": replicas.upscale_delay_s,
            "downscale_delay_s": replicas.downscale_delay_s,
        },
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
        health_check_period_s=5.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=parsed.longest_request_s + _DRAIN_S,
    )(ModelReplica)
    application: Application = deployment.bind(parsed.settings)
    return application


def ingress_app(args: dict[str, Any]) -> Application:
    """The application that takes requests; Serve calls it with the configuration's `args`, and `Ingress` gets its routes as user configuration."""
    job = IngressAppArgs.model_validate(args).job
    in_flight = (job.engine.max_running + job.engine.max_waiting) * job.replicas.max
    deployment: Any = serve.deployment(
        name=INGRESS_DEPLOYMENT,
        # One: what it counts (metrics, rates of keys, load, how a challenger does) is the whole endpoint's.
        num_replicas=1,
        # Twice what it admits: the refused must reach it to be told when to come back. What is beyond that, Serve's
        # proxy refuses. Bodies that are still on their way take no place here: the proxy waits for them.
        max_ongoing_requests=2 * in_flight + 64,
        max_queued_requests=4 * in_flight,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        ray_actor_options={"num_cpus": 0.1},
        # Another job's ingress starts beside this one, which answers until the other does.
        max_surge_percent=100,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=job.limits.timeout_s + _DRAIN_S,
    )(serve.ingress()(Ingress))
    application: Application = deployment.bind(job.model_dump_json())
    return application


def replica_settings(job: ServeJob, model: ServedModelConfig, checkpoint: ResolvedCheckpoint) -> ReplicaSettings:
    """What one model's replicas are made from."""
    return ReplicaSettings(
        path=str(checkpoint.path),
        version=checkpoint.pinned,
        connector=model.connector.model_dump_json() if model.connector is not None else None,
        dtype=model.dtype,
        device=model.device,
        budgets=tuple(sorted(job.budgets.offered)),
        policy=_input_policy(job),
        engine=job.engine,
        threads=job.replicas.threads,
    )


def _input_policy(job: ServeJob) -> InputPolicyConfig | None:
    policy = job.budgets.policy
    # Replicas have another working directory.
    return (
        policy.model_copy(update={"predictor": str(Path(policy.predictor).resolve())})
        if isinstance(policy, InputPolicyConfig)
        else None
    )


def route_settings(settings: ReplicaSettings) -> RouteSettings:
    """How the ingress reaches that model.

    The application's name is its content's, so that another version is another application.
    """
    name = "model-" + hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:8]
    return RouteSettings(app=name, version=settings.version, path=settings.path, connector=settings.connector)


def serve_config(
    job: ServeJob, champion: ReplicaSettings, challenger: ReplicaSettings | None = None, keys: str | None = None
) -> dict[str, Any]:
    """The whole endpoint in the form of `serve deploy`.

    Args:
        job: the endpoint.
        champion: its model.
        challenger: the other one, of a canary.
        keys: hash of the keys file, so that another file is read again.
    """
    models = [settings for settings in (champion, challenger) if settings is not None]
    routes = IngressRoutes(
        champion=route_settings(champion),
        challenger=route_settings(challenger) if challenger is not None else None,
        keys=keys,
    )
    applications = [*(_model(job, each) for each in models), _ingress(job, routes)]
    return {**start_options(job), "applications": applications}


def start_options(job: ServeJob) -> dict[str, Any]:
    """How Serve itself starts: where it listens, what stands before its proxy, what it logs and traces."""
    traces = job.traces
    tracing = (
        {"enabled": True, "exporter_import_path": traces.exporter, "sampling_ratio": traces.sampling_ratio}
        if traces is not None
        else None
    )
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": job.http.host, "port": job.http.port, "keep_alive_timeout_s": 30},
        "controller_options": {"runtime_env": {"env_vars": {**proxy_environment(job.limits), **_PATIENCE}}},
        "logging_config": LOGGING,
        **({"tracing_config": tracing} if tracing is not None else {}),
    }


def _model(job: ServeJob, settings: ReplicaSettings) -> dict[str, Any]:
    args = ModelAppArgs(settings=settings, replicas=job.replicas, longest_request_s=job.limits.timeout_s)
    return {
        "name": route_settings(settings).app,
        "route_prefix": None,
        "import_path": f"{__name__}:model_app",
        "args": args.model_dump(mode="json"),
    }


def _ingress(job: ServeJob, routes: IngressRoutes) -> dict[str, Any]:
    return {
        "name": job.name,
        "route_prefix": "/",
        "import_path": f"{__name__}:ingress_app",
        "args": IngressAppArgs(job=job).model_dump(mode="json"),
        "deployments": [{"name": INGRESS_DEPLOYMENT, "user_config": routes.model_dump(mode="json")}],
    }
