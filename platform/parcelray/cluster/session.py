"""A Ray session for this process: it joins a given cluster, or starts a private local instance and ends it again."""

import contextlib
import logging
import os
import re
import secrets
import shlex
import socket
import stat
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ray
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.exceptions import AuthenticationError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import parcelray
from parcelray.cluster.auth import MODE_VARIABLE, TOKEN_VARIABLE, find_token
from parcelray.cluster.worker_start import RAY_RECORD, await_worker, explained_worker_failures, failure_reason
from parcelray.environment import restored_environment
from parcelray.errors import SystemFailure, UserError

ADDRESS_VARIABLE = "RAY_ADDRESS"
FOLDER_VARIABLE = "RAY_TMPDIR"
CONNECT_TIMEOUT_S = 5.0
_START_ATTEMPTS = 3
# Ray sets this variable for the driver of a submitted job, whose runtime environment already contains the package.
_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_LEVEL_VARIABLE = "RAY_BACKEND_LOG_LEVEL"
_NICENESS_VARIABLE = "RAY_worker_niceness"
_PRESTART_VARIABLE = "RAY_prestart_worker_first_driver"
_GCS_ADDRESS = re.compile(r"(?P<host>[^:/\s]+):(?P<port>\d{1,5})")
_AUTH_LOGGER = "ray._private.authentication.authentication_token_setup"


@dataclass(frozen=True)
class RaySession:
    """The Ray instance that this process is connected to."""

    address: str
    """`HOST:PORT` of the cluster's GCS."""
    owned: bool
    """True if `ray_session` made the connection and will end it; False if Ray was initialised before."""
    resources: Mapping[str, float]
    """Total resources of all nodes at the start, by Ray's resource names (`CPU`, `GPU`, `memory` in bytes)."""


@contextlib.contextmanager
def ray_session(
    address: str | None = None,
    *,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    object_store_bytes: int | None = None,
    dashboard: bool = False,
) -> Iterator[RaySession]:
    """Connects this process to Ray and, on exit, ends only what it started.

    It uses the Ray instance that this process has already initialised, else `address`, else RAY_ADDRESS, else a new
    local instance.

    A local instance keeps its files in `temporary_folder()`. It uses an existing authentication token, or one that
    exists only in this process; Ray itself would write a world-readable `~/.ray/auth_token`. Its workers get its
    address, so that it is not confused with another instance on the same host.

    Workers can import the parcelray of this process, whether it is installed or not. The first worker has started when
    the context begins, because Ray itself waits forever for workers that cannot start.

    Args:
        address: `HOST:PORT` of a cluster's GCS; `local`: a new instance regardless of RAY_ADDRESS; None: as above.
        num_cpus: logical CPUs of a local instance; None: those of the machine, at least 4. With fewer, the tasks of Ray
            Data would wait forever for a CPU next to two training workers. Logical CPUs are slots for scheduling and
            may exceed the number of cores.
        num_gpus: GPUs of a local instance; None: all that Ray detects.
        object_store_bytes: shared memory of a local instance in bytes; None: Ray's default.
        dashboard: whether a local instance has a dashboard on the loopback address. It takes about ten processes of 95
            MB each. Ray's state API needs it.

    Raises:
        UserError: the address is not a GCS address, nothing responds there, the cluster rejects the connection, or
            Ray's temporary folder cannot be used.
        SystemFailure: Ray or its workers do not start, or a worker died and was not restarted.
    """
    if ray.is_initialized():
        yield _describe(owned=False)
        return
    target = address or os.environ.get(ADDRESS_VARIABLE) or "local"
    with contextlib.ExitStack() as cleanup:
        # Registered first, so that the variables are restored after the shutdown of Ray.
        cleanup.enter_context(restored_environment(ADDRESS_VARIABLE, TOKEN_VARIABLE, MODE_VARIABLE, FOLDER_VARIABLE))
        cleanup.enter_context(restored_environment("RAY_GCS_SERVER_PORT", "PYTHONBREAKPOINT"))
        cleanup.enter_context(restored_environment(_NICENESS_VARIABLE, _PRESTART_VARIABLE))
        # Needed on a joined cluster, too: this process creates Ray's lock files in the same folder.
        os.environ[FOLDER_VARIABLE] = str(temporary_folder())
        cleanup.callback(ray.shutdown)
        # Ray prints published errors, such as a retried task, even with `log_to_driver=False`.
        cleanup.enter_context(_published_errors_logged())
        with _quiet_core_worker():
            if target == "local":
                _start_with_retries(num_cpus, num_gpus, object_store_bytes, dashboard)
            else:
                _join(target)
        await_worker(on_this_host=target == "local")
        with explained_worker_failures():
            yield _describe(owned=True)


def num_nodes() -> int:
    """Counts the live nodes of the cluster that this process is connected to."""
    return sum(bool(node["Alive"]) for node in ray.nodes())  # type: ignore[no-untyped-call]


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """Returns the scheduling strategy of an actor that belongs to this process and must not die with another node."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def default_num_cpus() -> int:
    """Returns the logical CPUs of a local instance: those that this process may use, at least 4."""
    return max(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def temporary_folder() -> Path:
    """Returns the folder for Ray's sessions and lock files.

    It is RAY_TMPDIR, else `parcelray-<user id>` in the system's temporary folder. Ray's own default belongs to the user
    who ran Ray first on the machine, and other users cannot open its lock files.

    Raises:
        UserError: the folder cannot be created, other users can write to it, or Ray cannot use its path.
    """
    if chosen := os.environ.get(FOLDER_VARIABLE):
        folder = Path(chosen)
    else:
        folder = Path(tempfile.gettempdir()) / f"parcelray-{os.getuid()}"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            # Links are not followed: in a world-writable folder, any user could have created them.
            status = folder.lstat()
        except OSError as error:
            raise UserError(
                f"{folder} cannot be created ({error}); set {FOLDER_VARIABLE} to a writable folder."
            ) from error
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise UserError(
                f"{folder} must be a folder that only you can open; remove it, or set {FOLDER_VARIABLE} to another"
                " folder."
            )
    if not str(folder).isascii():
        raise UserError(
            f"{folder} has a character outside ASCII, which Ray rejects; set {FOLDER_VARIABLE} to another path."
        )
    return folder


def import_path() -> str | None:
    """Returns the folder that workers need on PYTHONPATH to import this parcelray; None if parcelray is installed.

    Site-packages is never added to PYTHONPATH, where it would precede the standard library.
    """
    folder = Path(parcelray.__file__).resolve().parent.parent
    installed = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    return None if folder in installed else str(folder)


def _start_with_retries(
    num_cpus: int | None, num_gpus: int | None, object_store_bytes: int | None, dashboard: bool
) -> None:
    """Starts a local instance, with retries after timeouts.

    Ray has fixed limits of 15 and 30 s for the start of its own processes, which a busy machine can exceed.
    """
    for attempts_left in reversed(range(_START_ATTEMPTS)):
        try:
            _start(num_cpus, num_gpus, object_store_bytes, dashboard)
            return
        except SystemFailure as error:
            if not attempts_left or "timed out" not in str(error).lower():
                raise
            ray.shutdown()


def _start(num_cpus: int | None, num_gpus: int | None, object_store_bytes: int | None, dashboard: bool) -> None:
    # The port is chosen here because the workers' environment must contain it before the instance exists.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    os.environ["RAY_GCS_SERVER_PORT"] = port
    # Ray's default is 15: next to busy processes its workers would get 3 % of a core and would hardly start.
    os.environ.setdefault(_NICENESS_VARIABLE, "0")
    # Ray starts one worker per CPU in advance, but without the runtime environment below, so that none is ever used.
    os.environ.setdefault(_PRESTART_VARIABLE, "0")
    if os.environ.get(MODE_VARIABLE, "").lower() != "disabled" and find_token() is None:
        os.environ[TOKEN_VARIABLE] = _process_token()
    worker_variables = {ADDRESS_VARIABLE: f"127.0.0.1:{port}"}
    if path := import_path():
        inherited = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry and entry != path]
        worker_variables["PYTHONPATH"] = os.pathsep.join([path, *inherited])
    try:
        with _quiet_about_auth():
            ray.init(
                "local",
                num_cpus=default_num_cpus() if num_cpus is None else num_cpus,
                num_gpus=num_gpus,
                object_store_memory=object_store_bytes,
                include_dashboard=dashboard,
                dashboard_host="127.0.0.1",
                runtime_env={"env_vars": worker_variables, "py_executable": _worker_interpreter()},
                **_quiet(),
            )
    except OSError as error:
        raise UserError(
            f"Ray cannot start here ({error}); set {FOLDER_VARIABLE} to a short, writable path with free space."
        ) from error
    except Exception as error:
        # Ray raises plain exceptions, RuntimeError and ValueError when one of its processes dies at the start.
        raise SystemFailure(f"Ray does not start here: {failure_reason(_newest_logs(), str(error))}") from error
    # Otherwise, state queries of this process search the host's processes for an instance, and fail if there are two.
    os.environ[ADDRESS_VARIABLE] = f"127.0.0.1:{port}"


def _worker_interpreter() -> str:
    """Returns the path of this interpreter, quoted because Ray inserts it into a shell command."""
    return shlex.quote(sys.executable)


def _newest_logs() -> Path:
    """Finds the logs of the newest instance of this process; a session's name ends with the driver's process id."""
    sessions = Path(os.environ[FOLDER_VARIABLE], "ray").glob(f"session_*_{os.getpid()}")
    return max(sessions, default=Path(os.environ[FOLDER_VARIABLE])) / "logs"


def _join(target: str) -> None:
    match = _GCS_ADDRESS.fullmatch(target)
    if match is None:
        raise UserError(
            f"{target} cannot be joined from here; legal: HOST:PORT of the cluster's GCS (port 6379 by default), or"
            " `local`. To send a job from outside, use `parcelray submit --address http://HOST:8265`."
        )
    try:
        # Checked first because Ray retries a dead address for minutes.
        socket.create_connection((match["host"], int(match["port"])), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise UserError(
            f"Nothing responds at {target} ({error}); check the address, unset {ADDRESS_VARIABLE} for a local run, or"
            " start the cluster."
        ) from error
    try:
        # Ray itself enables tokens only for instances on this host, never for a given address.
        with _quiet_about_auth():
            maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        ray.init(target, runtime_env=_shipped_package(), **_quiet())
    except (AuthenticationError, ConnectionError) as error:
        # With a wrong token, Ray reports only that it could not connect.
        raise UserError(
            f"{target} is open but rejects the connection; set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the token of"
            " its head node, and check that this is the port of the GCS (6379 by default)."
        ) from error
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        raise UserError(
            f"The cluster at {target} runs another version: {' '.join(str(error).split())}; install its versions of Ray"
            " and Python here."
        ) from error


def _shipped_package() -> dict[str, Any] | None:
    """Builds a runtime environment that sends this parcelray to the other nodes; None inside a submitted job."""
    return None if _JOB_VARIABLE in os.environ else {"py_modules": [str(Path(parcelray.__file__).resolve().parent)]}


def _describe(*, owned: bool) -> RaySession:
    return RaySession(address=ray.get_runtime_context().gcs_address, owned=owned, resources=ray.cluster_resources())  # type: ignore[no-untyped-call]


def _quiet() -> dict[str, Any]:
    return {"log_to_driver": False, "logging_level": logging.ERROR}


@cache
def _process_token() -> str:
    # One token per process: Ray caches the first token that it reads, so a second instance must use the same.
    return secrets.token_hex(32)


@contextlib.contextmanager
def _quiet_about_auth() -> Iterator[None]:
    logger = logging.getLogger(_AUTH_LOGGER)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _published_errors_logged() -> Iterator[None]:
    """Redirects the messages that Ray would print as `(raylet) ...` to the logger `parcelray.ray`, at level INFO."""
    original = ray._private.worker.print_to_stdstream

    def log(data: Mapping[str, Any], ignore_prefix: bool = False) -> None:
        logging.getLogger("parcelray.ray").info("%s", "\n".join(data["lines"]))

    ray._private.worker.print_to_stdstream = log
    try:
        yield
    finally:
        ray._private.worker.print_to_stdstream = original


@contextlib.contextmanager
def _quiet_core_worker() -> Iterator[None]:
    """Hides the log records of Ray's C++ part, which reads its log level when this process connects.

    The records are not meant for users. For example, each actor of Ray Data is reported for having arguments in the
    object store.
    """
    if _LEVEL_VARIABLE in os.environ:
        yield
        return
    # Not set in `os.environ`, which Ray's other processes inherit: their logs must keep the reasons of failures.
    os.putenv(_LEVEL_VARIABLE, "fatal")
    try:
        # Ray also reports the change of the level itself.
        with _without_ray_records():
            yield
    finally:
        os.unsetenv(_LEVEL_VARIABLE)


@contextlib.contextmanager
def _without_ray_records() -> Iterator[None]:
    """Buffers the standard error of this process and, on exit, writes all of it except Ray's log records."""
    with tempfile.TemporaryFile() as held:
        terminal = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
            held.seek(0)
            for line in held:
                if not RAY_RECORD.match(line.decode(errors="replace")):
                    os.write(2, line)
