"""Which process drives a run, and whether it is still alive: what tells an orphan from a run in progress."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_SIGTERM_EXIT_CODE = 128 + signal.SIGTERM


def driver_tag() -> str:
    """This process as `host:pid:start time`. The start time keeps a reused pid from passing for a dead driver."""
    return f"{socket.gethostname()}:{os.getpid()}:{_started(os.getpid())}"


def is_other_live_driver(tag: str) -> bool:
    """Whether a driver tag names another process of this host that still runs.

    A driver on another host cannot be seen from here and counts as dead: its job was submitted again, which the
    idempotent submission id allows only after the first one ended.
    """
    host, _, pid_and_start = tag.partition(":")
    pid, _, started = pid_and_start.partition(":")
    if host != socket.gethostname() or not pid.isdigit() or int(pid) == os.getpid():
        return False
    return _started(int(pid)) == started


def _started(pid: int) -> str | None:
    """Start of a process in clock ticks since boot; None when it is gone (or a zombie), or the system has no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    state, start = fields[0], fields[19]
    return None if state == "Z" else start


@contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """Turns SIGTERM into SystemExit(143) while the block runs, so that `finally` and `except` clauses get their turn.

    Only the main thread may set handlers; elsewhere the block just runs. A second SIGTERM is ignored while the first
    unwinds.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(_SIGTERM_EXIT_CODE)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def is_kill(error: BaseException) -> bool:
    """Whether an exception means that someone stopped the run, not that it failed."""
    # Ray's own SIGTERM handler, where it replaced ours, exits with the bare signal number.
    return isinstance(error, KeyboardInterrupt) or (
        isinstance(error, SystemExit) and error.code in (_SIGTERM_EXIT_CODE, int(signal.SIGTERM))
    )
