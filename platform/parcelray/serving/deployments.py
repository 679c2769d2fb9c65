"""The applications of endpoints on a running Serve: deploys, replaces and removes them, and describes them.

Serve is reached from a driver of the cluster, or from anywhere through the REST API of the cluster's dashboard.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ray
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from parcelray.cluster.auth import find_token
from parcelray.cluster.preflight import dashboard_url, get_json, put_json
from parcelray.cluster.session import import_path, temporary_folder
from parcelray.config.loader import apply_override, validate
from parcelray.config.serve import ServeJob
from parcelray.errors import SystemFailure, UserError
from parcelray.serving.app import INGRESS_IMPORT_PATH
from parcelray.serving.http.auth import ApiKey
from parcelray.serving.ingress.ingress import MODEL_DEPLOYMENT
from parcelray.serving.plan import PinnedEndpoint, pin

if TYPE_CHECKING:
    from rich.table import Table

_DEPLOY_TIMEOUT_S = 900.0
_DRAIN_TIMEOUT_S = 60.0
"""Time after the time limit of a request until a stopping endpoint must have ended, seconds."""
_NO_REASON = "no reason given"
_PATH = "/api/serve/applications/"


class Cluster(Protocol):
    """The Serve of a cluster."""

    poll_s: float
    """Pause between two queries while a change is awaited, seconds."""

    def details(self) -> dict[str, Any]:
        """Returns what runs, in the format of Serve's REST API."""
        ...

    def apply(self, config: dict[str, Any]) -> None:
        """Makes the applications those of a configuration, in the format of `serve deploy`; does not wait."""
        ...


class DriverCluster:
    """The Serve of the cluster that this process is connected to."""

    poll_s = 0.2

    def details(self) -> dict[str, Any]:
        """See `Cluster`."""
        details: dict[str, Any] = serve_client().get_serve_details()
        return details

    def apply(self, config: dict[str, Any]) -> None:
        """See `Cluster`."""
        serve_client().deploy_apps(ServeDeploySchema.model_validate(config))


class RemoteCluster:
    """The Serve of a cluster whose dashboard can be reached.

    Args:
        address: address of the dashboard, as in `dashboard_url`.

    Raises:
        UserError: there is no address.
    """

    poll_s = 1.0

    def __init__(self, address: str | None) -> None:
        self._url = dashboard_url(address)
        self._token = find_token()

    def details(self) -> dict[str, Any]:
        """See `Cluster`."""
        return get_json(self._url, _PATH, self._token)

    def apply(self, config: dict[str, Any]) -> None:
        """See `Cluster`."""
        # Serve's address cannot change while it runs; without it, the dashboard would log a difference.
        put_json(self._url, _PATH, self._token, {"http_options": self.details()["http_options"], **config})


@dataclass(frozen=True)
class EndpointState:
    """The state of an endpoint."""

    name: str
    status: str
    """Status of its ingress in Serve: RUNNING, DEPLOYING, UNHEALTHY, DEPLOY_FAILED or DELETING."""
    url: str
    """Address that the proxies listen on."""
    proxies: tuple[str, ...]
    """Address and status of each proxy."""
    models: dict[str, str]
    """Served versions, champion first, with the number of their replicas that run."""
    reducers: dict[str, dict[str, Any]]
    """Settings of the training-free reducer of each version that has one."""
    message: str
    """Serve's message about the status; empty if all is well."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the state as JSON-serialisable values."""
        return asdict(self)


def states_table(states: Sequence[EndpointState]) -> "Table":
    """Returns a table of endpoints for the console."""
    from rich.table import Table

    table = Table("endpoint", "status", "address", "models", "message")
    for state in states:
        models = "\n".join(
            f"{version}: {replicas}"
            + (f", reducer {state.reducers[version]['type']}" if version in state.reducers else "")
            for version, replicas in state.models.items()
        )
        table.add_row(state.name, state.status, "\n".join((state.url, *state.proxies)), models, state.message)
    return table


def endpoint_states(cluster: Cluster, name: str | None = None) -> list[EndpointState]:
    """Returns the state of one endpoint, or of all.

    Raises:
        UserError: there is no endpoint of that name.
    """
    details = cluster.details()
    names = _endpoints(details)
    if name is not None:
        _check_exists(name, names)
    return [_state(details, each) for each in names if name in (None, each)]


def deploy(
    pinned: PinnedEndpoint,
    cluster: Cluster | None = None,
    runtime_env: Mapping[str, Any] | None = None,
    say: Callable[[str], object] = str,
) -> None:
    """Deploys or updates the endpoint without downtime.

    1. New model versions start next to the old ones, and warm up.
    2. The ingress sends requests to them as soon as they answer; requests in flight stay with the old versions.
    3. The old versions stop after their last request.

    Args:
        pinned: the endpoint.
        cluster: where it runs; None: the cluster that this process is connected to.
        runtime_env: runtime environment of its applications; None: that which brings this process's package to them.
        say: called with what Serve waits for, such as resources, whenever that changes.

    Raises:
        SystemFailure: a model cannot be started; the old versions keep running.
    """
    cluster = cluster or DriverCluster()
    config = pinned.config()
    if runtime_env is None:
        runtime_env = _driver_runtime_env()
    if runtime_env:
        config["applications"] = [{**app, "runtime_env": dict(runtime_env)} for app in config["applications"]]
    *models, ingress = config["applications"]
    names = {app["name"] for app in config["applications"]}
    before = _deployed(cluster.details())
    own = _own(before, ingress["name"])
    # A declarative configuration lists all applications, so those of other endpoints are passed on unchanged.
    others = [app for name, app in before.items() if name not in own and name not in names]
    old = [before[name] for name in own if name not in names]
    if ingress["name"] in before:
        try:
            kept = [*others, *old, before[ingress["name"]]]
            _apply(cluster, config, [*kept, *models], names - {ingress["name"]}, say=say)
        except SystemFailure:
            # Removes the version that could not start; no request was sent to it.
            _apply(cluster, config, list(before.values()), own)
            raise
    # Without a running endpoint all applications start together, and the ingress waits for its model.
    _apply(cluster, config, [*others, *old, *models, ingress], names, say=say)
    if old:
        _apply(cluster, config, [*others, *models, ingress], names)


def update(cluster: Cluster, name: str, overrides: Sequence[str], say: Callable[[str], object] = str) -> PinnedEndpoint:
    """Resolves the references of a running endpoint again, with changes of its job, and rolls over to the result.

    Args:
        cluster: where it runs.
        name: name of the endpoint.
        overrides: changes such as `canary=null`.
        say: called with what Serve waits for, such as resources, whenever that changes.

    Raises:
        UserError: there is no such endpoint, or the changed job is not legal.
        SystemFailure: a model cannot be started; the old versions keep running.
    """
    details = cluster.details()
    _check_exists(name, _endpoints(details))
    running = _deployed(details)[name]
    data = dict(running["args"])
    for override in overrides:
        apply_override(data, override)
    job = validate(ServeJob, data, f"the job of the endpoint {name}")
    if job.name != name:
        raise UserError(f"name is {job.name}, but the endpoint {name} is updated; serve the job to start another one.")
    check_address(job, details)
    file = job.http.keys_file
    # From another machine, the endpoint keeps its keys.
    kept = running["deployments"][0]["user_config"]["keys"] if file is not None and not Path(file).exists() else []
    pinned = pin(job, keys=tuple(ApiKey(**key) for key in kept))
    deploy(pinned, cluster, running.get("runtime_env") or {}, say)
    return pinned


def stop(cluster: Cluster, name: str) -> None:
    """Removes an endpoint; requests in flight are finished first.

    Raises:
        UserError: there is no endpoint of that name.
        SystemFailure: it did not end in time.
    """
    details = cluster.details()
    _check_exists(name, _endpoints(details))
    before = _deployed(details)
    own = _own(before, name)
    if not own:
        # Somebody else has removed it, and it is finishing its requests.
        return
    timeout_s = ServeJob.model_validate(before[name]["args"]).limits.timeout_s + _DRAIN_TIMEOUT_S
    others = [app for each, app in before.items() if each not in own]
    # The ingress first: it ends after its last request is answered, and needs the models until then.
    _apply(cluster, {}, [*others, *(before[each] for each in own if each != name)], (), timeout_s)
    _apply(cluster, {}, others, (), timeout_s)


def application_names(details: Mapping[str, Any], name: str) -> list[str]:
    """Returns the names of the Serve applications of an endpoint, its ingress first; empty if it is not deployed."""
    return _own(_deployed(details), name)


def check_address(job: ServeJob, details: Mapping[str, Any]) -> None:
    """Checks that a running Serve listens on the job's address, because a running Serve cannot change its address.

    Raises:
        UserError: it listens on another address.
    """
    running = details.get("http_options") or {}
    address = (running.get("host"), running.get("port"))
    if running and address != (job.http.host, job.http.port):
        raise UserError(
            f"Serve runs on this cluster already and listens on {address[0]}:{address[1]}, not on"
            f" {job.http.host}:{job.http.port}; set http.host and http.port to its address (hosts other than the"
            " loopback need keys), or stop it first with `serve shutdown`."
        )


def _driver_runtime_env() -> dict[str, Any]:
    """Returns the runtime environment that brings this package to the applications of this driver.

    Serve builds and starts applications outside of the driver's job, whose packages are in Ray's own storage.
    """
    job: Mapping[str, Any] = ray.get_runtime_context().runtime_env
    if packages := job.get("py_modules"):
        return {"py_modules": list(packages)}
    return {"env_vars": {"PYTHONPATH": path}} if (path := import_path()) is not None else {}


def serve_client() -> Any:
    """Returns the client of the Serve that runs on the cluster of this process."""
    client = _get_global_client()
    assert client is not None, "Serve was started"
    return client


def _apply(
    cluster: Cluster,
    config: Mapping[str, Any],
    applications: list[dict[str, Any]],
    awaited: Collection[str],
    timeout_s: float = _DEPLOY_TIMEOUT_S,
    *,
    say: Callable[[str], object] = str,
) -> None:
    """Deploys exactly these applications; waits until the awaited ones run and the others have ended."""
    removed = _deployed(cluster.details()).keys() - {app["name"] for app in applications}
    cluster.apply({**config, "applications": applications})
    deadline = time.monotonic() + timeout_s
    said: set[str] = set()
    while time.monotonic() < deadline:
        # Serve needs a moment to begin; before, it still reports the old state.
        time.sleep(cluster.poll_s)
        present = cluster.details()["applications"]
        states = {name: present[name]["status"] for name in awaited if name in present}
        failed = [name for name, state in states.items() if state == "DEPLOY_FAILED"]
        if failed:
            raise SystemFailure(f"Serve cannot start {failed[0]}: {_reason(present[failed[0]])}")
        for name, state in states.items():
            text = _reason(present[name])
            if state == "DEPLOYING" and text not in {*said, _NO_REASON}:
                said.add(text)
                say(f"Serve starts {name}: {text}")
        if len(states) == len(awaited) and set(states.values()) <= {"RUNNING"} and not removed & set(present):
            return
    raise SystemFailure(
        f"Serve did not {'start' if awaited else 'stop'} the endpoint within {timeout_s:.0f} s; see Serve's logs below"
        f" {temporary_folder()} on the cluster for the reason."
    )


def _reason(application: Mapping[str, Any]) -> str:
    texts = [application["message"], *(each["message"] for each in application["deployments"].values())]
    lines = [line.strip() for text in texts for line in str(text or "").splitlines() if line.strip()]
    return lines[-1][:400] if lines else _NO_REASON


def _endpoints(details: Mapping[str, Any]) -> list[str]:
    """Returns the names of the endpoints: applications that accept requests, not those of their models."""
    return [
        name
        for name, application in details["applications"].items()
        if (application.get("deployed_app_config") or {}).get("import_path") == INGRESS_IMPORT_PATH
    ]


def _check_exists(name: str, names: Collection[str]) -> None:
    if name not in names:
        legal = f"legal: {', '.join(sorted(names))}" if names else "there is none on this cluster"
        raise UserError(f"{name} is not an endpoint of this cluster ({legal}); start it with `parcelray serve`.")


def _deployed(details: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the configurations of the deployed applications by name; those being removed have none."""
    applications = details["applications"].items()
    return {name: each["deployed_app_config"] for name, each in applications if each.get("deployed_app_config")}


def _own(deployed: Mapping[str, dict[str, Any]], ingress: str) -> list[str]:
    """Returns the names of an endpoint's applications: the ingress, and the models that it sends requests to."""
    if ingress not in deployed:
        return []
    return [ingress, *(route["app"] for route in _routes(deployed[ingress]))]


def _routes(ingress: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the settings of the routes of an ingress, champion first."""
    routes = ingress["deployments"][0]["user_config"]
    return [routes[name] for name in ("champion", "challenger") if routes.get(name) is not None]


def _state(details: Mapping[str, Any], name: str) -> EndpointState:
    application = details["applications"][name]
    models, reducers = {}, {}
    messages = [application["message"]]
    for route in _routes(application["deployed_app_config"]):
        model = details["applications"].get(route["app"], {})
        deployment = model.get("deployments", {}).get(MODEL_DEPLOYMENT, {})
        running = sum(replica["state"] == "RUNNING" for replica in deployment.get("replicas", ()))
        version = route["settings"]["model"]["reference"]
        models[version] = f"{running} of {deployment.get('target_num_replicas', 0)} replicas run"
        if (reducer := route["settings"].get("reducer")) is not None:
            reducers[version] = reducer
        messages += [model.get("message", ""), deployment.get("message", "")]
    http = details["http_options"]
    return EndpointState(
        name=name,
        status=str(application["status"]),
        url=f"http://{http['host']}:{http['port']}",
        proxies=tuple(f"proxy on {each['node_ip']}: {each['status']}" for each in details["proxies"].values()),
        models=models,
        reducers=reducers,
        message=next((text.strip().splitlines()[-1][:200] for text in messages if text and text.strip()), ""),
    )
