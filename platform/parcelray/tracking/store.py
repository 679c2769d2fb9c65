"""Where runs are recorded: which tracking URIs are legal, and how a SQLite store comes to exist before anyone writes to it."""

import fcntl
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from parcelray.errors import UserError

SERVER_SCHEMES = ("http", "https")
DATABASE_SCHEMES = ("postgresql", "mysql", "mssql")
_SQLITE_PREFIX = "sqlite:///"


def hide_credentials(text: str) -> str:
    """Masks user and password of every URL in a text."""
    return re.sub(r"(?<=://)[^/@\s]+(?=@)", "***", text)


def check_tracking_uri(uri: str, num_nodes: int) -> None:
    """Refuses a tracking URI that would fail later or lose data. Pure: touches neither disk nor network.

    Args:
        uri: the tracking URI of the job.
        num_nodes: nodes of the cluster that the job runs on.

    Raises:
        UserError: for a file store (gone from MLflow), an in-memory SQLite, SQLite on more than one node, or an unknown
            scheme.
    """
    scheme = uri.partition("://")[0].partition("+")[0] if "://" in uri else ""
    if scheme in SERVER_SCHEMES or scheme in DATABASE_SCHEMES:
        return
    if scheme == "sqlite":
        _check_sqlite(uri, num_nodes)
        return
    if scheme in ("", "file"):
        raise UserError(
            f"tracking URI {uri!r} is a file store, which MLflow no longer has; use sqlite:///runs/mlflow.db on one"
            " machine or http(s)://HOST:PORT of an MLflow server (`mlflow migrate-filestore` moves an old mlruns"
            " folder to SQLite)."
        )
    legal = ", ".join(["sqlite", *SERVER_SCHEMES, *DATABASE_SCHEMES])
    raise UserError(
        f"tracking URI {hide_credentials(uri)!r} has the unknown scheme {scheme!r}; legal schemes are {legal}."
    )


def _check_sqlite(uri: str, num_nodes: int) -> None:
    if _sqlite_path(uri) is None:
        raise UserError(
            f"tracking URI {uri!r} names no database file, and other processes cannot reach one in memory; write"
            " sqlite:///runs/mlflow.db."
        )
    if num_nodes > 1:
        raise UserError(
            f"tracking URI {uri!r} is SQLite, but the cluster has {num_nodes} nodes and only processes of one node may"
            " write to it; start an MLflow server (`mlflow server --backend-store-uri ...`) and give its"
            " http(s)://HOST:PORT."
        )


def _sqlite_path(uri: str) -> Path | None:
    """The database file of a SQLite URI; None for other URIs and for a database in memory."""
    if not uri.startswith(_SQLITE_PREFIX):
        return None
    name = uri.removeprefix(_SQLITE_PREFIX).partition("?")[0]
    return None if name in ("", ":memory:") else Path(name)


def ensure_store(uri: str) -> str:
    """Creates the store where that is ours to do, and makes its URI independent of the working directory.

    The driver calls this before any worker starts: creating the schema of a SQLite database takes seconds, and two
    processes that do it at once meet "database is locked".

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
    """Holds a lock beside a SQLite database, so that find-or-create is atomic between drivers; a server needs none of ours."""
    path = _sqlite_path(uri)
    if path is None:
        yield
        return
    with Path(f"{path}.lock").open("a") as lock:
        # The kernel drops the lock when its holder dies.
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def artifact_location(uri: str, experiment: str) -> str | None:
    """Where an experiment in a SQLite store keeps its files: beside the database. None: the server decides."""
    path = _sqlite_path(uri)
    if path is None:
        return None
    folder = re.sub(r"[^\w.-]+", "_", experiment).strip(".") or "experiment"
    return (path.resolve().parent / "artifacts" / folder).as_uri()
