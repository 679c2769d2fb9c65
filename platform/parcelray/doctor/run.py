"""Runs the checks of `parcelray doctor`: this machine, and what a job uses or the defaults."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parcelray.config.identity import Job
from parcelray.config.serve import ServeJob
from parcelray.config.train import TrackingConfig
from parcelray.doctor.finding import Finding
from parcelray.doctor.machine import (
    check_cores,
    check_disk,
    check_gpu,
    check_memory,
    check_ports,
    check_python,
    check_shared_memory,
    check_versions,
)
from parcelray.doctor.security import (
    check_binds,
    check_keys,
    check_modes,
    check_secrets,
    check_token_mode,
    check_vulnerabilities,
)
from parcelray.doctor.services import check_cluster, check_hub, check_ray, check_storage, check_tracking

_HUB = "hf:"
_GPU_KEYS = ("gpus_per_worker", "gpus_per_actor", "gpus")
_DASHBOARD_PORT, _MLFLOW_PORT = 8265, 5000


@dataclass(frozen=True)
class Target:
    """What is checked besides the machine."""

    tracking_uri: str | None
    storage: str
    endpoint_port: int
    keys_file: Path
    hub_models: tuple[str, ...] = ()
    """References `ORG/NAME@REVISION` of models on the Hugging Face hub."""
    needs_gpus: bool = False
    """Whether the job requests GPUs."""


def target_of(job: Job | None) -> Target:
    """Returns what a job uses; None: the defaults of all jobs."""
    storage, keys_file = Path("runs"), Path("runs/serve/keys.txt")
    port = 8000
    if job is None:
        return Target(TrackingConfig.model_fields["uri"].default, str(storage), port, keys_file)
    if isinstance(job, ServeJob):
        port, keys_file = job.http.port, Path(job.http.keys_file or keys_file)
    values = list(_values(job.model_dump(mode="json")))
    return Target(
        tracking_uri=job.tracking.uri,
        storage=str(getattr(job, "storage", storage)),
        endpoint_port=port,
        keys_file=keys_file,
        hub_models=tuple(
            dict.fromkeys(
                value.removeprefix(_HUB) for _, value in values if isinstance(value, str) and value.startswith(_HUB)
            )
        ),
        needs_gpus=any(key in _GPU_KEYS and value for key, value in values),
    )


def _values(data: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every value of nested dictionaries and lists with its key."""
    if isinstance(data, dict):
        for name, value in data.items():
            yield from _values(value, name)
    elif isinstance(data, list):
        for value in data:
            yield from _values(value, key)
    else:
        yield key, data


def examine(
    target: Target, *, address: str | None, security: bool, folder: Path, job_file: Path | None
) -> Iterator[Finding]:
    """Yields the finding of each check as soon as it is known.

    Args:
        target: what a job uses.
        address: URL of a cluster's dashboard; None: RAY_API_SERVER_ADDRESS.
        security: whether to check listening addresses, file modes, keys and secrets, too.
        folder: root of the project, with requirements.lock, jobs/ and runs/.
        job_file: file of the job, which is searched for secrets.
    """
    ports = {target.endpoint_port: "endpoint", _MLFLOW_PORT: "`make ui`", _DASHBOARD_PORT: "Ray dashboard"}
    yield check_python()
    yield check_versions(folder / "requirements.lock")
    yield check_cores()
    yield check_memory()
    yield check_shared_memory()
    yield check_disk(target.storage)
    yield check_ports(ports)
    yield check_gpu(target.needs_gpus and address is None)
    yield check_ray()
    yield check_tracking(target.tracking_uri, folder)
    yield check_storage(target.storage)
    yield check_cluster(address)
    yield check_hub(target.hub_models)
    if not security:
        return
    files = [path for pattern in ("jobs/**/*.yaml", "search_spaces/*.yaml", "*.yaml") for path in folder.glob(pattern)]
    yield check_binds((target.endpoint_port,))
    yield check_modes(target.keys_file, target.storage)
    yield check_keys(target.keys_file)
    yield check_secrets([*files, *([job_file] if job_file is not None else [])])
    yield check_token_mode()
    yield check_vulnerabilities()
