"""Rules of the tracking store: legal tracking URIs, keys, values and batches; and creation of a SQLite store.

Limits of MLflow 3.17: 100 params or tags and 1,000 metrics per batch, 1 MB per request; keys of 250, params of 6,000
and tags of 8,000 characters.
"""

import fcntl
import functools
import json
import logging
import os
import re
import sqlite3
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import unquote, urlparse

from parcelray.config.paths import SQLITE_PREFIX
from parcelray.environment import restored_environment
from parcelray.errors import ParcelrayError, SystemFailure, UserError
from parcelray.loopback import bypass_proxies_on_loopback

ParamValue = str | int | float | bool | None
RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
UnsentMetric = tuple[str, float, int, int]
"""A metric that a store does not have yet: key, value, time in milliseconds since 1970, step."""

SERVER_SCHEMES = ("http", "https")
DATABASE_SCHEMES = ("postgresql", "mysql", "mssql")
MAX_KEY = 250
MAX_PARAM = 6000
MAX_TAG = 8000
PARAMS_PER_BATCH = 100
METRICS_PER_BATCH = 1000
BATCH_BYTES = 900_000
_ARTIFACTS = "artifacts"
"""Name of the folder of artifacts next to a SQLite database."""
_TEST_EXPERIMENT = "parcelray-doctor"
_TEST_TIMEOUT_S = 10
"""Longest wait for an answer to one request of the round trip, seconds."""
REDACTED = "<redacted>"
_LOCK_TIMEOUT_S = 10.0
"""Longest wait for another process's lock on a SQLite database, seconds."""
SERVER_LIMIT_S = 120.0
"""Longest wait at the start of a command for an MLflow server that does not answer, seconds."""
_SERVER_TIMEOUT_S = 10.0
_SERVER_POLL_S = 2.0
_SQLITE_FAILURES = {
    "database is locked": "another process holds a lock on this database; wait until it has finished, or end it",
    "readonly database": "this database is read-only; use a database that can be written to",
    "database or disk is full": "there is no space left on the disk of this database; free some space",
    "unable to open database file": "this database cannot be opened; use the path of a file in a writable folder",
    "disk I/O error": "the disk of this database reports an input/output error; use another disk",
    "disk image is malformed": "this database is damaged; restore a copy, or use a new one",
    "file is not a database": "this file is not a SQLite database; use another path",
}
"""Remedies by the words of SQLite's error messages, which SQLAlchemy and MLflow wrap in errors of their own."""
_ARTIFACT_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Columns of MLflow's database with the places of artifacts."""

T = TypeVar("T")

logger = logging.getLogger(__name__)

# A word that ends in one of these names a secret. Plurals (`num_visual_tokens`, `keys: content`) are parcelray's own
# parameters.
_SECRET_WORD = re.compile(r"(token|passw(or)?ds?|secrets?|apikey|credentials?)$|^key$")


def check_tracking_uri(uri: str, num_nodes: int) -> None:
    """Refuse a tracking URI that would fail later or lose data, without touching disk or network.

    Args:
        uri: the tracking URI of the job.
        num_nodes: number of nodes of the cluster that the job runs on.

    Raises:
        UserError: the URI is a file store (removed from MLflow), SQLite in memory, SQLite on more than one node, or has
            an unknown scheme.
    """
    scheme = uri.partition("://")[0].partition("+")[0] if "://" in uri else ""
    if scheme in SERVER_SCHEMES or scheme in DATABASE_SCHEMES:
        return
    if scheme == "sqlite":
        _check_sqlite(uri, num_nodes)
        return
    if scheme in ("", "file"):
        raise UserError(
            f"Tracking URI {uri!r} is a file store, which MLflow no longer supports. Use sqlite:///runs/mlflow.db on"
            " one machine, or http(s)://HOST:PORT of an MLflow server (`mlflow migrate-filestore` moves an old mlruns"
            " folder to SQLite)."
        )
    legal = ", ".join(["sqlite", *SERVER_SCHEMES, *DATABASE_SCHEMES])
    raise UserError(f"Tracking URI {hide_credentials(uri)!r} has the unknown scheme {scheme!r}; use one of: {legal}.")


def _check_sqlite(uri: str, num_nodes: int) -> None:
    if _sqlite_path(uri) is None:
        raise UserError(
            f"Tracking URI {uri!r} names no database file, and other processes cannot open a database in memory; use"
            " sqlite:///runs/mlflow.db."
        )
    if num_nodes > 1:
        raise UserError(
            f"Tracking URI {uri!r} is SQLite, but the cluster has {num_nodes} nodes and only processes of one node may"
            " write to SQLite. Start an MLflow server (`mlflow server --backend-store-uri ...`) and set"
            " tracking.uri to its http(s)://HOST:PORT."
        )


def _sqlite_path(uri: str) -> Path | None:
    """The database file of a SQLite URI; None for other URIs and for a database in memory."""
    if not uri.startswith(SQLITE_PREFIX):
        return None
    name = uri.removeprefix(SQLITE_PREFIX).partition("?")[0]
    return None if name in ("", ":memory:") else Path(name)


def ensure_store(uri: str) -> str:
    """Make a store ready: wait for a server to answer, or create the SQLite database if it does not exist.

    The driver calls this before any worker starts: creating the schema of a SQLite database takes seconds, and two
    processes that do it at once fail with "database is locked". A database that was moved or copied together with its
    folder `artifacts` gets the new places of its artifacts, because MLflow stores absolute ones.

    Args:
        uri: a tracking URI that `check_tracking_uri` accepts for one node.

    Returns:
        The URI to hand to workers: for SQLite with an absolute path, because Ray workers have another working
        directory.

    Raises:
        UserError: see `check_tracking_uri`.
        SystemFailure: the database is locked, read-only, damaged or not a database, or the server does not answer.
    """
    bypass_proxies_on_loopback()
    check_tracking_uri(uri, num_nodes=1)
    if uri.startswith(SERVER_SCHEMES):
        _await_server(uri.rstrip("/"))
    path = _sqlite_path(uri)
    if path is None:
        return uri
    path = path.expanduser().resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    absolute = SQLITE_PREFIX + str(path) + "".join(uri.removeprefix(SQLITE_PREFIX).partition("?")[1:])
    from mlflow import MlflowClient

    with store_lock(absolute), explained_store_failures(absolute):
        # A lock of another process is found here, because MLflow would retry for half a minute.
        with closing(sqlite3.connect(path, timeout=_LOCK_TIMEOUT_S)) as database, database:
            database.execute("BEGIN IMMEDIATE")
            _relocate_artifacts(database, absolute)
        MlflowClient(tracking_uri=absolute).search_experiments(max_results=1)
    return absolute


def store_round_trip(uri: str) -> None:
    """Writes a run to the experiment `parcelray-doctor`, reads it and deletes it; a server is not waited for.

    Args:
        uri: see `ensure_store`.

    Raises:
        UserError: see `check_tracking_uri`, or the server rejects the user.
        SystemFailure: the store does not return what was written, a SQLite store cannot be used, or the server does not
            answer.
    """
    bypass_proxies_on_loopback()
    check_tracking_uri(uri, num_nodes=1)
    if _sqlite_path(uri) is not None:
        uri = ensure_store(uri)
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    with store_lock(uri), explained_store_failures(uri), single_attempts(_TEST_TIMEOUT_S):
        experiment = client.get_experiment_by_name(_TEST_EXPERIMENT)
        identifier = (
            client.create_experiment(_TEST_EXPERIMENT, artifact_location(uri, _TEST_EXPERIMENT))
            if experiment is None
            else experiment.experiment_id
        )
        run = client.create_run(identifier)
        try:
            client.log_metric(run.info.run_id, "value", 1.5)
            found = client.get_run(run.info.run_id).data.metrics
        finally:
            client.delete_run(run.info.run_id)
    if found != {"value": 1.5}:
        raise SystemFailure(f"{hide_credentials(uri)} returned {found} for a metric of 1.5; use another store.")


@contextmanager
def explained_store_failures(uri: str) -> Iterator[None]:
    """Turns errors of a store that its user can remedy into one sentence, also those that SQLAlchemy and MLflow wrap.

    Raises:
        SystemFailure: the SQLite database cannot be used, or the server does not answer.
        UserError: the server rejects the user.
    """
    try:
        yield
    except ParcelrayError:
        raise
    except Exception as error:
        path = _sqlite_path(uri)
        if path is None:
            _explain_server_failure(uri, error)
            raise
        remedy = next((remedy for words, remedy in _SQLITE_FAILURES.items() if words in str(error)), None)
        if remedy is None:
            raise
        raise SystemFailure(f"{path}: {remedy}, then run the same command again.") from error


def _explain_server_failure(uri: str, error: Exception) -> None:
    from mlflow.exceptions import MlflowException

    if not isinstance(error, MlflowException):
        return
    server, status = hide_credentials(uri), _status(error)
    if is_unreachable(error):
        raise SystemFailure(
            f"The MLflow server {server} does not answer ({error}); check that it runs and that this host reaches it,"
            " then run the same command again."
        ) from error
    if status in (401, 403):
        raise UserError(
            f"The MLflow server {server} rejects this user ({status}); set MLFLOW_TRACKING_USERNAME and"
            " MLFLOW_TRACKING_PASSWORD to a user with permission to write, on every node that runs jobs."
        ) from error


def is_unreachable(error: Exception) -> bool:
    """Whether an error of MLflow means that the store does not answer now, so that a later request may succeed."""
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException) and (_status(error) == 429 or _status(error) >= 500)


def _status(error: Any) -> int:
    """HTTP status of an error of MLflow's client; 500 if there was no answer."""
    return int(error.get_http_status_code())


@contextmanager
def single_attempts(timeout_s: int) -> Iterator[None]:
    """Let requests to an MLflow server fail at once; MLflow itself would retry each of them for four minutes.

    Args:
        timeout_s: longest wait for an answer, seconds.
    """
    changes = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_s)}
    with restored_environment(*changes):
        os.environ.update(changes)
        yield


@functools.cache
def _await_server(uri: str) -> None:
    """Waits until an MLflow server answers; once per process, because later requests are retried."""
    deadline = time.monotonic() + SERVER_LIMIT_S
    waiting = False
    while (reason := _no_answer(uri)) is not None:
        if time.monotonic() > deadline:
            raise SystemFailure(
                f"The MLflow server {hide_credentials(uri)} has not answered for {SERVER_LIMIT_S:.0f} s ({reason});"
                " check tracking.uri, and that the server runs and this host reaches it."
            )
        if not waiting:
            logger.warning("Waiting for the MLflow server %s (%s).", hide_credentials(uri), reason)
        waiting = True
        time.sleep(_SERVER_POLL_S)


def _no_answer(uri: str) -> str | None:
    """Why a server does not answer; None if it answers. An answer that is an error is left to MLflow's client."""
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=_SERVER_TIMEOUT_S):
            return None
    except urllib.error.HTTPError as error:
        return str(error) if error.code in (502, 503, 504) else None
    except (OSError, urllib.error.URLError) as error:
        # The client may be configured to accept the certificate.
        return None if "CERTIFICATE_VERIFY_FAILED" in str(error) else str(getattr(error, "reason", error))


def _relocate_artifacts(database: sqlite3.Connection, uri: str) -> None:
    """Replaces the former place of the artifacts of a moved or copied database by the folder next to the database."""
    if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'").fetchone():
        return
    for name, location in database.execute("SELECT name, artifact_location FROM experiments").fetchall():
        here = artifact_location(uri, name)
        assert here is not None, "the store is SQLite"
        root, _, folder = here.rpartition("/")
        former = str(location).removesuffix(f"/{folder}")
        is_ours = str(location).endswith(f"/{_ARTIFACTS}/{folder}") and location != here
        if not is_ours or not Path(unquote(urlparse(here).path)).is_dir():
            continue
        for table, column in _ARTIFACT_COLUMNS:
            database.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                (root, len(former) + 1, len(former) + 1, f"{former}/"),
            )


@contextmanager
def store_lock(uri: str) -> Iterator[None]:
    """Hold a lock file next to a SQLite database, so that find-or-create is atomic between drivers.

    Other stores are not locked: a tracking server serialises requests itself.
    """
    path = _sqlite_path(uri)
    if path is None:
        yield
        return
    with Path(f"{path}.lock").open("a") as lock:
        # The kernel releases the lock when its holder dies.
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def artifact_location(uri: str, experiment: str) -> str | None:
    """The artifact folder of an experiment in a SQLite store, next to the database; None: the server decides."""
    path = _sqlite_path(uri)
    if path is None:
        return None
    folder = re.sub(r"[^\w.-]+", "_", experiment).strip(".") or "experiment"
    return (path.resolve().parent / _ARTIFACTS / folder).as_uri()


def hide_credentials(text: str) -> str:
    """Mask user and password of every URL in a text."""
    return re.sub(r"(?<=://)[^/@\s]+(?=@)", "***", text)


def is_secret_key(key: str) -> bool:
    """Whether a parameter of this name (`hf_token`, `aws.secret_access_key`) is a secret and must not be recorded."""
    words = re.split(r"[^a-z0-9]+", re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", key).lower())
    return any(_SECRET_WORD.search(word) for word in words)


def clean_key(key: str) -> str:
    """A key that MLflow accepts: `@` (`val/nlvr/accuracy@64`) becomes `:`, other illegal characters become `_`."""
    return re.sub(r"[^\w./: -]", "_", key.replace("@", ":"))[:MAX_KEY]


def clean_params(params: Mapping[str, ParamValue]) -> dict[str, str]:
    """Parameters as MLflow stores them: text, cut to its limit, secrets masked. Numbers are never masked."""
    return {clean_key(key): _clean_value(key, value, MAX_PARAM) for key, value in params.items()}


def clean_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags as MLflow stores them: cut to its limit, secrets masked."""
    return {clean_key(key): _clean_value(key, value, MAX_TAG) for key, value in tags.items()}


def _clean_value(key: str, value: ParamValue, limit: int) -> str:
    if isinstance(value, str) and is_secret_key(key):
        return REDACTED
    text = hide_credentials(str(value))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def batches(entries: Sequence[tuple[str, T]], limit: int) -> Iterator[list[tuple[str, T]]]:
    """Cut (key, value) entries into batches of at most `limit` entries and `BATCH_BYTES` bytes."""
    batch: list[tuple[str, T]] = []
    size = 0
    for key, value in entries:
        entry_bytes = len(json.dumps([key, str(value)]))
        if batch and (len(batch) == limit or size + entry_bytes > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append((key, value))
        size += entry_bytes
    if batch:
        yield batch
