"""Rules of the tracking store: legal tracking URIs, keys, values and batches; and creation of a SQLite store.

Limits of MLflow 3.17: 100 params or tags and 1,000 metrics per batch, 1 MB per request; keys of 250, params of 6,000
and tags of 8,000 characters.
"""

import fcntl
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

from parcelray.errors import UserError

ParamValue = str | int | float | bool | None
RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

SERVER_SCHEMES = ("http", "https")
DATABASE_SCHEMES = ("postgresql", "mysql", "mssql")
MAX_KEY = 250
MAX_PARAM = 6000
MAX_TAG = 8000
PARAMS_PER_BATCH = 100
METRICS_PER_BATCH = 1000
BATCH_BYTES = 900_000
REDACTED = "<redacted>"
_SQLITE_PREFIX = "sqlite:///"

T = TypeVar("T")

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
    if not uri.startswith(_SQLITE_PREFIX):
        return None
    name = uri.removeprefix(_SQLITE_PREFIX).partition("?")[0]
    return None if name in ("", ":memory:") else Path(name)


def ensure_store(uri: str) -> str:
    """Create the SQLite database if the URI names one that does not exist, and make its path absolute.

    The driver calls this before any worker starts: creating the schema of a SQLite database takes seconds, and two
    processes that do it at once fail with "database is locked".

    Args:
        uri: a tracking URI that `check_tracking_uri` accepts for one node.

    Returns:
        The URI to hand to workers: for SQLite with an absolute path, because Ray workers have another working
        directory.
    """
    check_tracking_uri(uri, num_nodes=1)
    path = _sqlite_path(uri)
    if path is None:
        return uri
    path = path.expanduser().resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    absolute = _SQLITE_PREFIX + str(path) + "".join(uri.removeprefix(_SQLITE_PREFIX).partition("?")[1:])
    from mlflow import MlflowClient

    with store_lock(absolute):
        MlflowClient(tracking_uri=absolute).search_experiments(max_results=1)
    return absolute


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
    return (path.resolve().parent / "artifacts" / folder).as_uri()


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
