"""Checks of what a job uses: a local Ray, the MLflow store, storage, a Ray cluster and the Hugging Face hub."""

import os
import queue
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from parcelray.cluster.auth import find_token
from parcelray.cluster.preflight import check_cluster as query_cluster
from parcelray.cluster.preflight import dashboard_url
from parcelray.cluster.session import ray_session
from parcelray.cluster.worker_start import actor_round_trip
from parcelray.config.paths import SQLITE_PREFIX
from parcelray.doctor.finding import Finding, guarded
from parcelray.doctor.machine import nearest_folder
from parcelray.errors import SystemFailure
from parcelray.files import is_local, open_storage, write_object
from parcelray.tracking.store import hide_credentials, store_round_trip

_OBJECT_STORE_BYTES = 100 * 2**20
_HTTP_TIMEOUT_S = 10
_STORAGE_LIMIT_S = 60.0


@guarded("Ray", "read Ray's logs below RAY_TMPDIR, and run the check again when the machine is less busy")
def check_ray() -> Finding:
    """Starts a local Ray and gets an answer from an actor."""
    started = time.monotonic()
    with ray_session("local", num_cpus=2, object_store_bytes=_OBJECT_STORE_BYTES):
        actor_round_trip()
    return Finding("Ray", "pass", f"starts here, and an actor answers ({time.monotonic() - started:.0f} s)")


@guarded(
    "MLflow",
    "start the server or restore the database of tracking.uri, and check MLFLOW_TRACKING_USERNAME and _PASSWORD",
)
def check_tracking(uri: str | None, folder: Path = Path()) -> Finding:
    """Writes a run to the MLflow store, reads it and deletes it.

    Args:
        uri: tracking URI; None: runs are not tracked.
        folder: working folder, which may contain a file store of an old version of MLflow.
    """
    if uri is None:
        return Finding("MLflow", "skip", "the job is not tracked (tracking.uri is null)")
    shown = hide_credentials(uri)
    if uri.startswith(SQLITE_PREFIX) and not Path(uri.removeprefix(SQLITE_PREFIX)).expanduser().is_file():
        return Finding("MLflow", "skip", f"{shown} does not exist yet; the first run creates it")
    store_round_trip(uri)
    if (folder / "mlruns").is_dir():
        return Finding(
            "MLflow",
            "warn",
            f"{shown} works, but {folder / 'mlruns'} is a file store, which MLflow no longer reads",
            "move its runs with `mlflow migrate-filestore`, or remove the folder",
        )
    return Finding("MLflow", "pass", f"{shown}: a run was written, read and deleted")


@guarded("storage", "check the path or address, the credentials in the environment, and who may write there")
def check_storage(storage: str) -> Finding:
    """Writes an object to the storage of runs, reads it and deletes it.

    Args:
        storage: folder or fsspec URI.
    """
    # Clients of object stores retry for minutes, so a thread waits for them, which does not keep the process alive.
    outcome: queue.Queue[bool | Exception] = queue.Queue()
    threading.Thread(target=_storage_round_trip, args=(storage, outcome), daemon=True).start()
    try:
        returned = outcome.get(timeout=_STORAGE_LIMIT_S)
    except queue.Empty:
        raise SystemFailure(f"{hide_credentials(storage)} did not respond within {_STORAGE_LIMIT_S:g} s.") from None
    if isinstance(returned, Exception):
        raise returned
    if not returned:
        return Finding("storage", "fail", f"{storage} returns other bytes than were written", "use other storage")
    return Finding("storage", "pass", f"{hide_credentials(storage)}: an object was written, read and deleted")


def _storage_round_trip(storage: str, outcome: queue.Queue[bool | Exception]) -> None:
    """Puts whether the storage returns what was written, or the exception that it raises, into a queue."""
    try:
        filesystem, root = open_storage(storage)
        if is_local(filesystem):
            # The folder of runs is created by the first run.
            root = str(nearest_folder(Path(root)))
        path, content = f"{root}/.parcelray-doctor-{uuid.uuid4().hex}", os.urandom(64)
        write_object(filesystem, path, content)
        try:
            found = filesystem.cat_file(path)
        finally:
            filesystem.rm_file(path)
        outcome.put(found == content)
    except Exception as error:  # noqa: BLE001 - raised again in the thread of the check
        outcome.put(error)


@guarded("cluster", "check --address, the SSH tunnel to the head node, and RAY_AUTH_TOKEN")
def check_cluster(address: str | None) -> Finding:
    """Queries the cluster's dashboard with the token of this user.

    Args:
        address: URL of the dashboard; None: RAY_API_SERVER_ADDRESS.
    """
    if address is None and not os.environ.get("RAY_API_SERVER_ADDRESS"):
        return Finding("cluster", "skip", "no cluster is configured (--address, RAY_API_SERVER_ADDRESS)")
    url, token = dashboard_url(address), find_token()
    version = query_cluster(url, token)
    if token is None:
        return Finding(
            "cluster",
            "warn",
            f"Ray {version} at {url} accepts requests without a token, so everyone who reaches it can run code",
            "start the cluster with RAY_AUTH_MODE=token and a token from `ray get-auth-token --generate`",
        )
    return Finding("cluster", "pass", f"Ray {version} at {url} accepts the token")


@guarded("hub", "check the network, HF_ENDPOINT and HF_TOKEN, or set HF_HUB_OFFLINE=1 if all models are in the cache")
def check_hub(models: Sequence[str]) -> Finding:
    """Queries the Hugging Face hub.

    Args:
        models: references `ORG/NAME@REVISION` of models that the job takes from the hub.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return Finding("hub", "skip", "HF_HUB_OFFLINE=1 switches the hub off")
    if not models and not os.environ.get("HF_ENDPOINT") and not os.environ.get("HF_TOKEN"):
        return Finding("hub", "skip", "nothing uses the hub (models hf:ORG/NAME@REVISION, HF_ENDPOINT, HF_TOKEN)")
    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    api = HfApi(endpoint=endpoint)
    for model in models:
        name, _, revision = model.partition("@")
        api.model_info(name, revision=revision or None, timeout=_HTTP_TIMEOUT_S)
    if not models:
        list(api.list_models(limit=1))
    return Finding("hub", "pass", f"{endpoint} responds" + (f" and has {', '.join(models)}" if models else ""))
