"""The process that drives an MLflow run, and a check whether it is alive, to detect orphaned runs."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_SIGTERM_EXIT_CODE = 128 + signal.SIGTERM


def driver_tag() -> str:
    """Tag of this process, `host:pid:start time`; the start time excludes a later process with the same pid."""
    return f"{socket.gethostname()}:{os.getpid()}:{_started(os.getpid())}"


def is_other_live_driver(tag: str) -> bool:
    """Whether a driver tag names another process of this host that is still running.

    A driver on another host cannot be checked from here and counts as dead. Its job was submitted again, which the
    idempotent submission id allows only after the first submission ended.
    """
    host, _, pid_and_start = tag.partition(":")
    pid, _, started = pid_and_start.partition(":")
    if host != socket.gethostname() or not pid.isdigit() or int(pid) == os.getpid():
        return False
    return _started(int(pid)) == started


def _started(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot; None for an ended process or a zombie, or without /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    state, start = fields[0], fields[19]
    return None if state == "Z" else start


@contextmanager
def sigterm_as_exit() -> Iterator[Callable[[], bool]]:
    """Raise SystemExit(143) on SIGTERM while the block runs, so that `finally` and `except` clauses are executed.

    Only the main thread may set signal handlers; in other threads the block runs unchanged. A second SIGTERM is ignored
    while the first one unwinds the stack.

    Yields:
        A function that tells whether SIGTERM arrived. A call that it interrupts may replace the exception:
        `ray.get` raises SystemExit(1).
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    received = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal received
        received = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(_SIGTERM_EXIT_CODE)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield lambda: received
    except BaseException as error:
        if received and not is_kill(error):
            raise SystemExit(_SIGTERM_EXIT_CODE) from error
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


def is_kill(error: BaseException) -> bool:
    """Whether an exception means that the run was stopped from outside, not that it failed."""
    # Ray's own SIGTERM handler, where it replaced ours, exits with the signal number alone.
    return isinstance(error, KeyboardInterrupt) or (
        isinstance(error, SystemExit) and error.code in (_SIGTERM_EXIT_CODE, int(signal.SIGTERM))
    )
