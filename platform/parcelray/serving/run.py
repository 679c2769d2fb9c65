"""Starts, updates and stops an endpoint: connects to Ray, starts Serve, and deploys its applications in order."""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.context import _disconnect, _get_global_client
from ray.serve.schema import ProxyStatus, ServeDeploySchema
from rich.console import Console

from parcelray.cluster.capacity import Need, Part, await_capacity
from parcelray.cluster.node_inputs import check_inputs
from parcelray.cluster.session import ADDRESS_VARIABLE, import_path, num_nodes, ray_session, temporary_folder
from parcelray.config.serve import HttpConfig, InputPolicyConfig, ServeJob
from parcelray.errors import SystemFailure, UserError
from parcelray.serving.app import INGRESS_CPUS, PROXY_TIMEOUT_S, start_options
from parcelray.serving.plan import PinnedEndpoint, pin
from parcelray.tracking.store import check_tracking_uri

_POLL_S = 0.2
_DEPLOY_TIMEOUT_S = 900.0


@contextmanager
def endpoint(
    pinned: PinnedEndpoint, *, address: str | None = None, say: Callable[[str], object] = lambda line: None
) -> Iterator[str]:
    """Runs an endpoint for the duration of the context and yields its URL; at the end, requests in flight are finished.

    Args:
        pinned: the endpoint.
        address: address of the Ray cluster; None: that of the environment variables, else a local one.
        say: called with a sentence if the endpoint waits for resources of the cluster.

    Raises:
        UserError: Ray cannot be started or connected to, the port is in use, or the cluster can never hold the
            replicas.
        SystemFailure: a model cannot be started, or the resources were not free within `replicas.wait_s`.
    """
    job = pinned.job
    cpus = int(job.replicas.max * job.replicas.cpus + (job.canary is not None) * job.replicas.cpus + 1) + 2
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if _proxy_will_start_here(address):
        _check_port(job.http)
    with ray_session(address, num_cpus=max(4, cpus)) as session, ExitStack() as cleanup:
        if session.owned:
            # Serve identifies a session by its Ray job number, which is the same for the first job of every new Ray.
            # Without disconnecting, the next session of this process would use this Serve's client.
            cleanup.callback(_disconnect)
        if job.samples is not None and job.tracking.uri is not None:
            check_tracking_uri(job.tracking.uri, num_nodes())
        _check_running(job.http)
        if _get_global_client(raise_if_no_controller_running=False) is None:
            # An endpoint that runs already may be unchanged, and then it needs nothing.
            await_capacity(needed_resources(job), job.replicas.wait_s, "replicas.wait_s", say)
        models = [model.pin for model in (pinned.champion, pinned.challenger) if model is not None]
        policy = job.budgets.policy
        check_inputs(models, [policy.predictor] if isinstance(policy, InputPolicyConfig) else [])
        _start(job)
        try:
            deploy(pinned)
            yield f"http://{'127.0.0.1' if job.http.host in ('0.0.0.0', '::') else job.http.host}:{job.http.port}"
        finally:
            # The ingress first: it ends after its last request is answered, and needs the models until then.
            for name in _own(_deployed(), job.name):
                serve.delete(name)


def needed_resources(job: ServeJob) -> Need:
    """Returns the resources that an endpoint needs at least: the first replicas of its models, and its ingress."""
    replicas = job.replicas
    models = 1 if job.canary is None else 2
    return Need(
        "The endpoint",
        (
            Part(models * replicas.min, "replica", {"CPU": replicas.cpus, "GPU": replicas.gpus}),
            Part(1, "ingress", {"CPU": INGRESS_CPUS}),
        ),
        "lower replicas.min or the resources of each replica",
    )


def _start(job: ServeJob) -> None:
    try:
        serve.start(**start_options(job))
    except TimeoutError as error:
        # Serve waits one minute for its proxy. On a busy machine the proxy takes longer, and it is still starting.
        if not _proxy_becomes_ready():
            raise SystemFailure(
                f"Serve's proxy was not ready after {PROXY_TIMEOUT_S:.0f} s; see Serve's logs below"
                f" {temporary_folder()} for the reason, or start the endpoint again when the machine is less busy."
            ) from error
    except RayActorError as error:
        raise SystemFailure(
            f"The process of Serve's proxy ended at its start; see Serve's logs below {temporary_folder()} for the"
            " reason."
        ) from error


def _proxy_becomes_ready() -> bool:
    deadline = time.monotonic() + PROXY_TIMEOUT_S
    # Connects this process to the controller, which runs although `serve.start` failed.
    _client()
    while time.monotonic() < deadline:
        proxies = serve.status().proxies.values()
        if proxies and all(proxy == ProxyStatus.HEALTHY for proxy in proxies):
            return True
        time.sleep(_POLL_S)
    return False


def _proxy_will_start_here(address: str | None) -> bool:
    """Whether Serve's proxy, which runs on the head node, will be started on this machine."""
    if not ray.is_initialized():
        return (address or os.environ.get(ADDRESS_VARIABLE, "local")) == "local"
    head = ray.get_runtime_context().gcs_address.rpartition(":")[0]
    here = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return head in ("127.0.0.1", here) and _get_global_client(raise_if_no_controller_running=False) is None


def _check_port(http: HttpConfig) -> None:
    """Checks that the port is free; Serve's proxy would retry forever without an error."""
    try:
        with socket.create_server(
            (http.host, http.port), family=socket.AF_INET6 if ":" in http.host else socket.AF_INET
        ):
            pass
    except OSError as error:
        raise UserError(
            f"Cannot listen on port {http.port} of {http.host} ({error.strerror}); choose another port with --port."
        ) from None


def _check_running(http: HttpConfig) -> None:
    """Checks that a running Serve listens on the job's address, because a running Serve cannot change its address."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return
    running = client.http_config
    if (running.host, running.port) != (http.host, http.port):
        raise UserError(
            f"Serve runs on this cluster already and listens on {running.host}:{running.port}, not on"
            f" {http.host}:{http.port}; set http.host and http.port to its address (hosts other than the loopback need"
            " keys), or stop it first with `serve shutdown`."
        )


def deploy(pinned: PinnedEndpoint) -> None:
    """Deploys or updates the endpoint without downtime.

    1. New model versions start next to the old ones, and warm up.
    2. The ingress sends requests to them as soon as they answer; requests in flight stay with the old versions.
    3. The old versions stop after their last request.

    Raises:
        SystemFailure: a model cannot be started; the old versions keep running.
    """
    config = _with_environment(pinned.config())
    *models, ingress = config["applications"]
    names = {app["name"] for app in config["applications"]}
    before = _deployed()
    own = _own(before, ingress["name"])
    # A declarative configuration lists all applications, so those of other endpoints are passed on unchanged.
    others = [app for name, app in before.items() if name not in own and name not in names]
    old = [before[name] for name in own if name not in names]
    if ingress["name"] in before:
        try:
            _apply(config, [*others, *old, before[ingress["name"]], *models], names - {ingress["name"]})
        except SystemFailure:
            # Removes the version that could not start; no request was sent to it.
            _apply(config, list(before.values()), own)
            raise
    # Without a running endpoint all applications start together, and the ingress waits for its model.
    _apply(config, [*others, *old, *models, ingress], names)
    if old:
        _apply(config, [*others, *models, ingress], names)


def run_endpoint(pinned: PinnedEndpoint, console: Console, *, address: str | None = None) -> None:
    """Serves until SIGINT or SIGTERM.

    SIGHUP resolves the job's model references again and rolls over to the new versions.

    Args:
        pinned: the endpoint.
        console: where progress is printed.
        address: address of the Ray cluster; None: that of the environment variables, else a local one.
    """
    stop, reload = threading.Event(), threading.Event()
    _warn(pinned, console)
    console.print(
        f"Starting {pinned.champion.pinned} at {', '.join(map(str, sorted(pinned.job.budgets.offered)))} visual tokens",
    )
    with endpoint(pinned, address=address, say=lambda line: console.print(line, markup=False, soft_wrap=True)) as url:
        # Only now, because Ray installs its own handlers when it starts.
        for number, event in ((signal.SIGINT, stop), (signal.SIGTERM, stop), (signal.SIGHUP, reload)):
            signal.signal(number, lambda *_, event=event: event.set())
        console.print(f"{pinned.job.name} answers at {url}/v1; Ctrl-C stops it", soft_wrap=True)
        while not stop.wait(_POLL_S):
            if reload.is_set():
                reload.clear()
                pinned = _rolled_over(pinned, console)
        console.print("Stopping: finishing requests in flight")


def _warn(pinned: PinnedEndpoint, console: Console) -> None:
    for warning in pinned.warnings:
        console.print(warning, style="yellow", soft_wrap=True)


def _rolled_over(pinned: PinnedEndpoint, console: Console) -> PinnedEndpoint:
    try:
        new = pin(pinned.job)
        deploy(new)
    except (UserError, SystemFailure) as error:
        console.print(f"The old version keeps running: {error}", style="red", soft_wrap=True)
        return pinned
    _warn(new, console)
    console.print(f"Now serving {new.champion.pinned}")
    return new


def _apply(config: dict[str, Any], applications: list[dict[str, Any]], awaited: Collection[str]) -> None:
    """Deploys exactly these applications; waits until the awaited ones run and all others are removed."""
    _client().deploy_apps(ServeDeploySchema.model_validate({**config, "applications": applications}))
    names = {app["name"] for app in applications}
    deadline = time.monotonic() + _DEPLOY_TIMEOUT_S
    while time.monotonic() < deadline:
        # Serve needs a moment to begin; before, it still reports the old state.
        time.sleep(_POLL_S)
        present = serve.status().applications
        states = {name: str(present[name].status.value) for name in awaited if name in present}
        failed = [name for name, state in states.items() if state == "DEPLOY_FAILED"]
        if failed:
            raise SystemFailure(f"Serve cannot start {failed[0]}: {_reason(present[failed[0]])}")
        if len(states) == len(awaited) and set(states.values()) <= {"RUNNING"} and set(present) <= names:
            return
    raise SystemFailure(
        f"Serve did not start the endpoint within {_DEPLOY_TIMEOUT_S:.0f} s; see Serve's logs below"
        f" {temporary_folder()} for the reason."
    )


def _reason(application: Any) -> str:
    texts = [application.message, *(deployment.message for deployment in application.deployments.values())]
    lines = [line.strip() for text in texts for line in str(text or "").splitlines() if line.strip()]
    return lines[-1][:400] if lines else "no reason given"


def _deployed() -> dict[str, dict[str, Any]]:
    """Returns the configurations of the deployed applications by name."""
    configs: dict[str, dict[str, Any]] = {}
    for name, application in _client().get_serve_details()["applications"].items():
        config = application.get("deployed_app_config")
        if config is not None:
            configs[name] = config
    return configs


def _own(deployed: dict[str, dict[str, Any]], ingress: str) -> list[str]:
    """Returns the names of an endpoint's applications: the ingress, and the models that it sends requests to."""
    if ingress not in deployed:
        return []
    routes = deployed[ingress]["deployments"][0]["user_config"]
    return [ingress, *(routes[name]["app"] for name in ("champion", "challenger") if routes.get(name) is not None)]


def _client() -> Any:
    client = _get_global_client()
    assert client is not None, "Serve was started"
    return client


def _with_environment(config: dict[str, Any]) -> dict[str, Any]:
    """Adds the import path of this package, because Serve builds the applications in separate tasks."""
    if (path := import_path()) is None:
        return config
    return {
        **config,
        "applications": [{**app, "runtime_env": {"env_vars": {"PYTHONPATH": path}}} for app in config["applications"]],
    }
