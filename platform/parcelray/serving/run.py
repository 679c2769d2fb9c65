"""Starts, updates and stops an endpoint: connects to Ray, starts Serve, and deploys its applications in order."""

import functools
import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.context import _disconnect, _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ProxyStatus
from rich.console import Console

from parcelray.cluster.capacity import Need, Part, await_capacity
from parcelray.cluster.node_inputs import check_inputs
from parcelray.cluster.session import ADDRESS_VARIABLE, num_nodes, ray_session, temporary_folder
from parcelray.config.serve import InputPolicyConfig, ServeJob
from parcelray.errors import SystemFailure, UserError
from parcelray.serving.app import INGRESS_CPUS, INGRESS_DEPLOYMENT, PROXY_TIMEOUT_S, start_options
from parcelray.serving.deployments import (
    DriverCluster,
    application_names,
    check_address,
    deploy,
    serve_client,
    stop,
)
from parcelray.serving.plan import PinnedEndpoint, pin
from parcelray.serving.supervision import held_port, ray_watched, signals
from parcelray.serving.watch import DeathWatch
from parcelray.tracking.store import check_tracking_uri

_POLL_S = 0.2
_WATCH_PERIOD_S = 1.0
"""Time between two queries for dead processes and notices, seconds."""
_NOTICES_TIMEOUT_S = 5.0
_SIGNAL_S = 10.0
"""Longest time between the exception of a signal and the thread that reads its number, on a busy machine, seconds."""


@contextmanager
def endpoint(pinned: PinnedEndpoint, *, address: str | None = None, console: Console | None = None) -> Iterator[str]:
    """Runs an endpoint for the duration of the context and yields its URL; at the end, requests in flight are finished.

    An endpoint with `detached` keeps running.

    Args:
        pinned: the endpoint.
        address: address of the Ray cluster; None: that of the environment variables, else a local one.
        console: where waiting for resources of the cluster is printed, and that Ray died, which ends this process.
            None: nothing is printed, and a dead Ray is not noticed.

    Raises:
        UserError: Ray cannot be started or connected to, the port is in use, or the cluster can never hold the
            replicas.
        SystemFailure: a model cannot be started, or the resources were not free within `replicas.wait_s`.
    """
    job = pinned.job
    cpus = int(job.replicas.max * job.replicas.cpus + (job.canary is not None) * job.replicas.cpus + 1) + 2
    # Warnings are those of this driver's handles, about replicas that died; `DeathWatch` reports them in a sentence.
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    with ExitStack() as cleanup:
        if _ray_will_start(address):
            if job.detached:
                raise UserError(
                    "detached is true, but there is no cluster to hand the endpoint over to: the Ray of this command"
                    " ends with it; give --address, or leave detached out."
                )
            cleanup.enter_context(held_port(job.http))
        elif _proxy_will_start_here():
            with held_port(job.http):
                pass
        session = cleanup.enter_context(ray_session(address, num_cpus=max(4, cpus)))
        if session.owned:
            # Serve identifies a session by its Ray job number, which is the same for the first job of every new Ray.
            # Without disconnecting, the next session of this process would use this Serve's client.
            cleanup.callback(_disconnect)
        if console is not None:
            cleanup.enter_context(ray_watched(console))
        if job.samples is not None and job.tracking.uri is not None:
            check_tracking_uri(job.tracking.uri, num_nodes())
        say = functools.partial(console.print, markup=False, soft_wrap=True) if console is not None else str
        if _get_global_client(raise_if_no_controller_running=False) is not None:
            check_address(job, DriverCluster().details())
        else:
            # An endpoint that runs already may be unchanged, and then it needs nothing.
            await_capacity(needed_resources(job), job.replicas.wait_s, "replicas.wait_s", say)
        models = [model.pin for model in (pinned.champion, pinned.challenger) if model is not None]
        policy = job.budgets.policy
        check_inputs(models, [policy.predictor] if isinstance(policy, InputPolicyConfig) else [])
        _start(job)
        was_running = bool(application_names(DriverCluster().details(), job.name))
        try:
            deploy(pinned, say=say)
        except BaseException:
            if not was_running:
                _stop(job)
            raise
        try:
            yield f"http://{'127.0.0.1' if job.http.host in ('0.0.0.0', '::') else job.http.host}:{job.http.port}"
        finally:
            if not job.detached:
                _stop(job)


def _stop(job: ServeJob) -> None:
    cluster = DriverCluster()
    # An interrupted start may have deployed nothing, and another command may have stopped the endpoint.
    if application_names(cluster.details(), job.name):
        stop(cluster, job.name)


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
    serve_client()
    while time.monotonic() < deadline:
        proxies = serve.status().proxies.values()
        if proxies and all(proxy == ProxyStatus.HEALTHY for proxy in proxies):
            return True
        time.sleep(_POLL_S)
    return False


def _ray_will_start(address: str | None) -> bool:
    """Whether this command starts a Ray of its own, and with it a proxy on this machine."""
    return not ray.is_initialized() and (address or os.environ.get(ADDRESS_VARIABLE) or "local") == "local"


def _proxy_will_start_here() -> bool:
    """Whether the Ray that this process is connected to has its head, where the proxy runs, on this machine."""
    if not ray.is_initialized() or _get_global_client(raise_if_no_controller_running=False) is not None:
        return False
    head = ray.get_runtime_context().gcs_address.rpartition(":")[0]
    here = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return head in ("127.0.0.1", here)


def run_endpoint(pinned: PinnedEndpoint, console: Console, *, address: str | None = None) -> None:
    """Serves until SIGINT or SIGTERM; the first finishes requests in flight, a second ends the process at once.

    SIGHUP resolves the job's model references again and rolls over to the new versions. A detached endpoint is only
    started, and keeps running.

    Args:
        pinned: the endpoint.
        console: where progress is printed.
        address: address of the Ray cluster; None: that of the environment variables, else a local one.

    Raises:
        SystemExit: a signal came before the endpoint answered; the exit code is 128 and the number of the signal.
    """
    _warn(pinned, console)
    console.print(
        f"Starting {pinned.champion.pinned} at {', '.join(map(str, sorted(pinned.job.budgets.offered)))} visual tokens",
    )
    name = pinned.job.name
    with signals(console) as received:
        try:
            with endpoint(pinned, address=address, console=console) as url:
                if pinned.job.detached:
                    console.print(
                        f"{name} answers at {url}/v1 and keeps running; `parcelray endpoint stop {name}` stops it",
                        soft_wrap=True,
                    )
                    return
                received.answers()
                console.print(f"{name} answers at {url}/v1; Ctrl-C stops it", soft_wrap=True)
                deaths, due = DeathWatch(application_names(DriverCluster().details(), name)), 0.0
                while not received.stop.wait(_POLL_S):
                    if received.reload.is_set():
                        received.reload.clear()
                        pinned = _rolled_over(pinned, console)
                        deaths = DeathWatch(application_names(DriverCluster().details(), name))
                    if time.monotonic() >= due:
                        _report(deaths, name, console)
                        due = time.monotonic() + _WATCH_PERIOD_S
        except (KeyboardInterrupt, SystemExit):
            # The exception can be earlier than the thread that reads the signals.
            if not received.stop.wait(_SIGNAL_S):
                raise
            raise SystemExit(received.exit_code) from None


def _report(deaths: DeathWatch, name: str, console: Console) -> None:
    """Prints which processes died or were replaced, and the notices of the ingress."""

    def say(sentences: list[str]) -> None:
        for sentence in sentences:
            console.print(f"{time.strftime('%H:%M:%S')} {sentence}", style="yellow", soft_wrap=True)

    # A process that is being replaced does not answer; the next report has its part.
    with suppress(RayError, RayServeException, TimeoutError):
        say(deaths.update(DriverCluster().details(), time.monotonic()))
        notices = serve.get_deployment_handle(INGRESS_DEPLOYMENT, name).notices.remote()
        say(notices.result(timeout_s=_NOTICES_TIMEOUT_S))


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
