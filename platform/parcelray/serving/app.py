"""The Serve applications of an endpoint as a declarative configuration: one per model version, one for the ingress.

`parcelray serve` deploys the same configuration that `parcelray serve --build` writes for `serve deploy`.
"""

import hashlib
from typing import Any

from ray import serve
from ray.serve import Application

from parcelray.config.base import StrictModel
from parcelray.config.paths import WITH_TEXT
from parcelray.config.reducer import ReducerConfig
from parcelray.config.serve import InputPolicyConfig, ReplicasConfig, ServedModelConfig, ServeJob
from parcelray.models.checkpoint import ResolvedCheckpoint
from parcelray.serving.http.auth import ApiKey
from parcelray.serving.http.proxy_guard import proxy_environment
from parcelray.serving.ingress.ingress import MODEL_DEPLOYMENT, Ingress, IngressRoutes, RouteSettings
from parcelray.serving.replica import ReplicaSettings
from parcelray.serving.replica.model_replica import ModelReplica

INGRESS_DEPLOYMENT = "Ingress"
INGRESS_IMPORT_PATH = f"{__name__}:ingress_app"
"""Import path of the ingress in a configuration, by which endpoints are found among Serve's applications."""
INGRESS_CPUS = 0.1
"""Logical CPUs of the ingress."""
LOGGING = {"encoding": "JSON", "enable_access_log": False}
"""Logs one line of JSON per record.

Serve's access log is off: the endpoint's own record of a request has more fields, and Serve would add one in each of
its three processes.
"""
PROXY_TIMEOUT_S = 300.0
"""Time for Serve's proxy to become ready on a busy machine, seconds."""
PROXY_VARIABLES = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": f"{PROXY_TIMEOUT_S / 3:.0f}",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "20",
}
"""Environment of Serve's controller: how it checks proxies.

It replaces a proxy that is not ready at three checks. The default of 5 s per check is so short that on a busy machine
no proxy ever becomes ready.

It replaces a proxy that fails three health checks. A check of a dead proxy fails at once, so with one second between
the checks it is replaced after about 3 s. With the default of 10 s, connections were refused for 33 s. A check of a
busy proxy fails after the timeout, so a proxy that does not respond is kept for 60 s, as with the default.
"""
_RESERVED_CALLS = 8
"""Calls per replica in addition to requests: health checks, statistics, inspections."""
_DRAIN_S = 5.0
"""Time after the longest request before a stopping replica is killed, seconds."""


class ModelAppArgs(StrictModel):
    """Arguments of `model_app` in the configuration."""

    settings: ReplicaSettings
    replicas: ReplicasConfig
    longest_request_s: float


def model_app(args: dict[str, Any]) -> Application:
    """Builds the application of one model version; Serve calls it with the configuration's `args`."""
    parsed = ModelAppArgs.model_validate(args)
    replicas, engine = parsed.replicas, parsed.settings.engine
    deployment: Any = serve.deployment(
        name=MODEL_DEPLOYMENT,
        max_ongoing_requests=engine.max_running + engine.max_waiting + _RESERVED_CALLS,
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
    """Builds the application that accepts requests; Serve calls it with the configuration's `args`, which are the job.

    `Ingress` gets its routes as user configuration.
    """
    job = ServeJob.model_validate(args)
    in_flight = (job.engine.max_running + job.engine.max_waiting) * job.replicas.max
    deployment: Any = serve.deployment(
        name=INGRESS_DEPLOYMENT,
        # Exactly one: its counts (metrics, rates of keys, load, outcomes of a challenger) are those of the endpoint.
        num_replicas=1,
        # Twice the number that it admits, because its refusals state when to retry. Serve's proxy refuses the rest.
        # Bodies that are still being received do not count: the proxy waits for them.
        max_ongoing_requests=2 * in_flight + 64,
        max_queued_requests=4 * in_flight,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        ray_actor_options={"num_cpus": INGRESS_CPUS},
        # The ingress of a changed job starts next to the old one, which answers until the new one does.
        max_surge_percent=100,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=job.limits.timeout_s + _DRAIN_S,
    )(serve.ingress()(Ingress))
    application: Application = deployment.bind(job)
    return application


def replica_settings(
    job: ServeJob, model: ServedModelConfig, checkpoint: ResolvedCheckpoint, reducer: ReducerConfig | None = None
) -> ReplicaSettings:
    """Returns the settings of the replicas of one of a job's models.

    Args:
        job: the endpoint.
        model: the champion's or the challenger's configuration.
        checkpoint: what `model.reference` was resolved to.
        reducer: the model's reducer, which the job or the model registry names; None: none.
    """
    return ReplicaSettings(
        pin=checkpoint.pin,
        model=model.model_copy(update={"reference": checkpoint.pinned}),
        reducer=reducer,
        budgets=tuple(sorted(job.budgets.offered)),
        policy=_input_policy(job),
        engine=job.engine,
        threads=job.replicas.threads,
    )


def _input_policy(job: ServeJob) -> InputPolicyConfig | None:
    policy = job.budgets.policy
    return policy if isinstance(policy, InputPolicyConfig) else None


def route_settings(settings: ReplicaSettings) -> RouteSettings:
    """Returns how the ingress reaches a model.

    The application's name is a hash of the settings, so another version is another application.
    """
    name = "model-" + hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:8]
    return RouteSettings(app=name, settings=settings)


def serve_config(
    job: ServeJob, champion: ReplicaSettings, challenger: ReplicaSettings | None = None, keys: tuple[ApiKey, ...] = ()
) -> dict[str, Any]:
    """Returns the configuration of the whole endpoint in the format of `serve deploy`.

    Args:
        job: the endpoint.
        champion: settings of its model.
        challenger: settings of the other model of a canary.
        keys: the API keys, as hashes; empty: none is needed.
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
    """Returns the options of `serve.start`: address, proxy middleware, logging and tracing."""
    traces = job.traces
    tracing = (
        {"enabled": True, "exporter_import_path": traces.exporter, "sampling_ratio": traces.sampling_ratio}
        if traces is not None
        else None
    )
    return {
        "proxy_location": {"head": "HeadOnly", "every_node": "EveryNode"}[job.http.proxies],
        "http_options": {"host": job.http.host, "port": job.http.port, "keep_alive_timeout_s": 30},
        "controller_options": {"runtime_env": {"env_vars": {**proxy_environment(job.limits), **PROXY_VARIABLES}}},
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
        "import_path": INGRESS_IMPORT_PATH,
        "args": job.model_dump(mode="json", context=WITH_TEXT),
        "deployments": [{"name": INGRESS_DEPLOYMENT, "user_config": routes.model_dump(mode="json")}],
    }
