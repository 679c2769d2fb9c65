"""Waits for conditions that other processes cause, and ends processes that a test started."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

LIMIT_S = 400.0
"""Longest wait for a condition in seconds; only a hang reaches it, even on a busy machine."""


def wait_until(
    condition: Callable[[], object],
    what: str,
    process: subprocess.Popen[bytes] | None = None,
    limit_s: float = LIMIT_S,
) -> None:
    """Waits for a condition; the test fails if the process that should cause it ends first."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if process is not None and process.poll() is not None:
            raise AssertionError(f"The process ended with exit code {process.returncode} before this was true: {what}.")
        if time.monotonic() > deadline:
            raise AssertionError(f"After {limit_s:g} s this was still not true: {what}.")
        time.sleep(0.05)


def own_ray() -> dict[str, str]:
    """Returns an environment in which a command starts a new Ray, even if this process is connected to a shared one."""
    shared = ("RAY_ADDRESS", "RAY_GCS_SERVER_PORT", "RAY_AUTH_TOKEN")
    return {name: value for name, value in os.environ.items() if name not in shared}


def end_session(leader: int) -> None:
    """Kills the remaining processes of a process session."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getsid(int(entry.name)) == leader:
                    os.kill(int(entry.name), signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue
