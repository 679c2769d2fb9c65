"""An endpoint brought up, kept, changed and taken down: the model pinned, Ray joined or started, the applications deployed in order."""

import hashlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.context import _disconnect, _get_global_client
from ray.serve.schema import ProxyStatus, ServeDeploySchema
from rich.console import Console

from parcelray import __version__
from parcelray.cluster.session import ADDRESS_VARIABLE, import_path, num_nodes, ray_session, temporary_folder
from parcelray.config.model import CheckpointModelConfig
from parcelray.config.serve import HttpConfig, InputPolicyConfig, ServedModelConfig, ServeJob
from parcelray.errors import SystemFailure, UserError
from parcelray.models.checkpoint import ResolvedCheckpoint
from parcelray.models.vlm import connector_of
from parcelray.serving.accepted_budgets import gate_warnings
from parcelray.serving.app import PROXY_TIMEOUT_S, replica_settings, serve_config, start_options
from parcelray.serving.engine.budget_chooser import load_predictor
from parcelray.serving.http.auth import read_keys
from parcelray.tracking.provenance import resolve_model
from parcelray.tracking.store import check_tracking_uri, ensure_store

_POLL_S = 0.2
_DEPLOY_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class PinnedEndpoint:
    """A job whose models are resolved, once."""

    job: ServeJob
    champion: ResolvedCheckpoint
    challenger: ResolvedCheckpoint | None
    keys: str | None
    """Hash of the keys file; None: there is none."""
    warnings: tuple[str, ...] = ()
    """What its owner should know before it starts."""

    def config(self) -> dict[str, Any]:
        """For Serve."""
        champion = replica_settings(self.job, self.job.model, self.champion)
        canary = self.job.canary
        challenger = (
            replica_settings(self.job, canary.model, self.challenger)
            if canary is not None and self.challenger is not None
            else None
        )
        return serve_config(self.job, champion, challenger, self.keys)

    def to_yaml(self) -> str:
        """The file that `serve deploy` takes."""
        folders = [checkpoint.path for checkpoint in (self.champion, self.challenger) if checkpoint is not None]
        needed = [f"parcelray {__version__}, installed", *(f"the folder {folder}" for folder in folders)]
        needed += [f"the file {self.job.http.keys_file}"] if self.job.http.keys_file is not None else []
        lines = [
            f"{self.job.name}: {self.champion.pinned}. Deploy it with `serve deploy FILE`.",
            *(f"Every node needs {each}." for each in needed),
            (
                "http_options, controller_options and logging_config count only where this is the first that starts"
                " Serve on the cluster."
            ),
        ]
        return "".join(f"# {line}\n" for line in lines) + yaml.safe_dump(self.config(), sort_keys=False)


def pin(job: ServeJob) -> PinnedEndpoint:
    """Resolves the models of a job and checks what can be checked before anything starts.

    Raises:
        UserError: a model is not to be had, cannot give an offered budget, its gates did not accept the load policy's
            floor, or the keys or the budget predictor cannot be read.
    """
    keys = None
    if job.http.keys_file is not None:
        # The ingress has another working directory.
        file = Path(job.http.keys_file).resolve()
        read_keys(file)
        keys = hashlib.sha256(file.read_bytes()).hexdigest()
        job = job.model_copy(update={"http": job.http.model_copy(update={"keys_file": str(file)})})
    if job.samples is not None and job.tracking.uri is not None:
        # The schema is made here, once; the ingress writes.
        job = job.model_copy(
            update={"tracking": job.tracking.model_copy(update={"uri": ensure_store(job.tracking.uri)})}
        )
    if isinstance(job.budgets.policy, InputPolicyConfig):
        load_predictor(job.budgets.policy, job.budgets.offered)
    champion = resolve(job, job.model)
    challenger = resolve(job, job.canary.model) if job.canary is not None else None
    _check_budgets(job, job.model, champion)
    if job.canary is not None and challenger is not None:
        _check_budgets(job, job.canary.model, challenger)
    models = [champion] if challenger is None else [champion, challenger]
    pinned = PinnedEndpoint(
        job, champion, challenger, keys, tuple(warning for model in models for warning in gate_warnings(job, model))
    )
    if len({app["name"] for app in pinned.config()["applications"]}) < len(pinned.config()["applications"]):
        raise UserError(
            f"Champion and challenger are both {champion.pinned}, so there is nothing to compare; name another version"
            " in canary.model.reference."
        )
    return pinned


@contextmanager
def endpoint(pinned: PinnedEndpoint, *, address: str | None = None) -> Iterator[str]:
    """Brings an endpoint up for the time of the context, yields its URL, and takes it down again, letting requests in flight end.

    Raises:
        UserError: Ray cannot be started or joined, or the port is taken.
        SystemFailure: a model cannot be started.
    """
    job = pinned.job
    cpus = int(job.replicas.max * job.replicas.cpus + (job.canary is not None) * job.replicas.cpus + 1) + 2
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if _proxy_will_start_here(address):
        _check_port(job.http)
    with ray_session(address, num_cpus=max(4, cpus)) as session, ExitStack() as cleanup:
        if session.owned:
            # Serve knows a session by its job's number, and the first job of every new Ray has the same: the next one
            # would find this Serve.
            cleanup.callback(_disconnect)
        if job.samples is not None and job.tracking.uri is not None:
            check_tracking_uri(job.tracking.uri, num_nodes())
        _check_running(job.http)
        _start(job)
        try:
            deploy(pinned)
            yield f"http://{'127.0.0.1' if job.http.host in ('0.0.0.0', '::') else job.http.host}:{job.http.port}"
        finally:
            # The ingress first: it goes when its last request has its answer, and until then needs the models.
            for name in _own(_deployed(), job.name):
                serve.delete(name)


def _start(job: ServeJob) -> None:
    try:
        serve.start(**start_options(job))
    except TimeoutError as error:
        # Serve waits for its proxy for one minute; the proxy of a busy machine takes longer and is not ended meanwhile.
        if not _proxy_becomes_ready():
            raise SystemFailure(
                f"Serve's proxy was not ready after {PROXY_TIMEOUT_S:.0f} s. Read Serve's logs below"
                f" {temporary_folder()} for the reason, or start the endpoint again when the machine is less busy."
            ) from error
    except RayActorError as error:
        raise SystemFailure(
            f"The process of Serve's proxy ended at its start. Serve's logs below {temporary_folder()} hold the reason."
        ) from error


def _proxy_becomes_ready() -> bool:
    deadline = time.monotonic() + PROXY_TIMEOUT_S
    # Connects this process to the controller, which `serve.start` has left running.
    _client()
    while time.monotonic() < deadline:
        proxies = serve.status().proxies.values()
        if proxies and all(proxy == ProxyStatus.HEALTHY for proxy in proxies):
            return True
        time.sleep(_POLL_S)
    return False


def _proxy_will_start_here(address: str | None) -> bool:
    """Whether Serve's proxy, which runs on the head node, has still to be started, on this machine."""
    if not ray.is_initialized():
        return (address or os.environ.get(ADDRESS_VARIABLE, "local")) == "local"
    head = ray.get_runtime_context().gcs_address.rpartition(":")[0]
    here = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return head in ("127.0.0.1", here) and _get_global_client(raise_if_no_controller_running=False) is None


def _check_port(http: HttpConfig) -> None:
    """Serve's proxy would try again and again."""
    try:
        with socket.create_server(
            (http.host, http.port), family=socket.AF_INET6 if ":" in http.host else socket.AF_INET
        ):
            pass
    except OSError as error:
        raise UserError(
            f"Port {http.port} of {http.host} cannot be listened on ({error.strerror}); choose another one with --port."
        ) from None


def _check_running(http: HttpConfig) -> None:
    """A Serve that runs already listens where it does, whatever the job says; that address must be the one that the job was checked for."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return
    running = client.http_config
    if (running.host, running.port) != (http.host, http.port):
        raise UserError(
            f"Serve runs on this cluster already and listens on {running.host}:{running.port}, not on"
            f" {http.host}:{http.port}; set http.host and http.port so (another host than the loopback's needs keys),"
            " or end it first with `serve shutdown`."
        )


def deploy(pinned: PinnedEndpoint) -> None:
    """Makes the endpoint what the job says, without a moment in which nothing answers.

    1. New model versions start beside the old ones, and warm up.
    2. The ingress sends requests to them as soon as they answer it; requests in flight end where they are.
    3. The old versions go, after their last request.

    Raises:
        SystemFailure: a model cannot be started; the old ones stay as they were.
    """
    config = _with_environment(pinned.config())
    *models, ingress = config["applications"]
    names = {app["name"] for app in config["applications"]}
    before = _deployed()
    own = _own(before, ingress["name"])
    # A declarative configuration names all applications, so those of others are in it as they are.
    others = [app for name, app in before.items() if name not in own and name not in names]
    old = [before[name] for name in own if name not in names]
    if ingress["name"] in before:
        try:
            _apply(config, [*others, *old, before[ingress["name"]], *models], names - {ingress["name"]})
        except SystemFailure:
            # What could not start goes, and the requests never knew of it.
            _apply(config, list(before.values()), own)
            raise
    # Without an endpoint before, all start together, and the ingress waits for its model.
    _apply(config, [*others, *old, *models, ingress], names)
    if old:
        _apply(config, [*others, *models, ingress], names)


def run_endpoint(pinned: PinnedEndpoint, console: Console, *, address: str | None = None) -> None:
    """Serves until SIGINT or SIGTERM.

    SIGHUP resolves the job's references again and rolls over to what they stand for now.
    """
    stop, again = threading.Event(), threading.Event()
    _warn(pinned, console)
    console.print(
        f"Starting {pinned.champion.pinned} at {', '.join(map(str, sorted(pinned.job.budgets.offered)))} visual tokens",
        highlight=False,
    )
    with endpoint(pinned, address=address) as url:
        # Only now: Ray puts its own handlers in when it starts.
        for number, event in ((signal.SIGINT, stop), (signal.SIGTERM, stop), (signal.SIGHUP, again)):
            signal.signal(number, lambda *_, event=event: event.set())
        console.print(f"{pinned.job.name} answers at {url}/v1; Ctrl-C stops it", highlight=False, soft_wrap=True)
        while not stop.wait(_POLL_S):
            if again.is_set():
                again.clear()
                pinned = _rolled_over(pinned, console)
        console.print("Stopping: requests in flight may end", highlight=False)


def _warn(pinned: PinnedEndpoint, console: Console) -> None:
    for warning in pinned.warnings:
        console.print(warning, style="yellow", highlight=False, soft_wrap=True)


def _rolled_over(pinned: PinnedEndpoint, console: Console) -> PinnedEndpoint:
    try:
        new = pin(pinned.job)
        deploy(new)
    except (UserError, SystemFailure) as error:
        console.print(f"The old version stays: {error}", style="red", highlight=False, soft_wrap=True)
        return pinned
    _warn(new, console)
    console.print(f"Now serving {new.champion.pinned}", highlight=False)
    return new


def resolve(job: ServeJob, model: ServedModelConfig) -> ResolvedCheckpoint:
    """The checkpoint of one of a job's models.

    Raises:
        UserError: the reference stands for nothing.
    """
    uri = job.tracking.uri
    # The registry is opened only where it is asked: MLflow takes seconds to load.
    tracking_uri = ensure_store(uri) if uri is not None and model.reference.startswith("models:/") else None
    return resolve_model(CheckpointModelConfig(reference=model.reference), tracking_uri)


def _check_budgets(job: ServeJob, model: ServedModelConfig, checkpoint: ResolvedCheckpoint) -> None:
    if model.connector is not None:
        return
    connector = connector_of(checkpoint.path)
    for budget in job.budgets.offered:
        connector.check_budget(budget)


def _apply(config: dict[str, Any], applications: list[dict[str, Any]], awaited: Collection[str]) -> None:
    """Deploys exactly these applications and waits for some of them, and until no others are there."""
    _client().deploy_apps(ServeDeploySchema.model_validate({**config, "applications": applications}))
    names = {app["name"] for app in applications}
    deadline = time.monotonic() + _DEPLOY_TIMEOUT_S
    while time.monotonic() < deadline:
        # Serve takes a moment to begin; what it has not begun is still shown as running.
        time.sleep(_POLL_S)
        found = serve.status().applications
        states = {name: str(found[name].status.value) for name in awaited if name in found}
        failed = [name for name, state in states.items() if state == "DEPLOY_FAILED"]
        if failed:
            raise SystemFailure(f"Serve cannot start {failed[0]}: {_reason(found[failed[0]])}")
        if len(states) == len(awaited) and set(states.values()) <= {"RUNNING"} and set(found) <= names:
            return
    raise SystemFailure(
        f"Serve did not bring the endpoint up within {_DEPLOY_TIMEOUT_S:.0f} s; its logs are below"
        f" {temporary_folder()}."
    )


def _reason(application: Any) -> str:
    texts = [application.message, *(deployment.message for deployment in application.deployments.values())]
    lines = [line.strip() for text in texts for line in str(text or "").splitlines() if line.strip()]
    return lines[-1][:400] if lines else "no reason given"


def _deployed() -> dict[str, dict[str, Any]]:
    """Configurations of the applications that are there, by name."""
    found: dict[str, dict[str, Any]] = {}
    for name, application in _client().get_serve_details()["applications"].items():
        config = application.get("deployed_app_config")
        if config is not None:
            found[name] = config
    return found


def _own(deployed: dict[str, dict[str, Any]], ingress: str) -> list[str]:
    """Names of an endpoint's applications: the ingress, and the models that it sends requests to."""
    if ingress not in deployed:
        return []
    routes = deployed[ingress]["deployments"][0]["user_config"]
    return [ingress, *(routes[name]["app"] for name in ("champion", "challenger") if routes.get(name) is not None)]


def _client() -> Any:
    client = _get_global_client()
    assert client is not None, "Serve was started"
    return client


def _with_environment(config: dict[str, Any]) -> dict[str, Any]:
    """Serve builds the applications in tasks of its own, which find this package as the workers do."""
    if (path := import_path()) is None:
        return config
    return {
        **config,
        "applications": [{**app, "runtime_env": {"env_vars": {"PYTHONPATH": path}}} for app in config["applications"]],
    }
