"""Workers of Ray that do not start or end: a first one is awaited, and the reason becomes one sentence."""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RaySystemError, WorkerCrashedError

from parcelray.errors import SystemFailure

START_LIMIT_S = 90.0
"""Time for a first worker, in seconds. With the start of Ray, a failure is reported within two minutes."""
_POLL_S = 1.0
_STARTED_PROCESS = re.compile(r"Started worker process with pid (\d+)")
RAY_RECORD = re.compile(r"\[\d{4}-[^\]]* (?P<severity>[A-Z]) \d+ \d+\](?P<message>.*)")
"""A log record of Ray's C++ part: `[2026-11-29 04:30:32,426 E 5337 5337] (raylet) worker_pool.cc:660: message`.

Its severities of failures are E, C and F.
"""
# A worker that started notes its job and actor first; a stack trace has an address in each line.
_OTHER_LINE = re.compile(r":(job_id|actor_name|task_name):|\*\*\* |.*\[0x[0-9a-f]+\]")
_RAYLET_LOGS = ("raylet.err", "raylet.out", "gcs_server.err", "gcs_server.out")
_MAX_LENGTH = 400


@ray.remote(num_cpus=0)
def _start() -> None:
    """Runs as soon as a worker is there."""


def await_worker(*, on_this_host: bool, clock: Callable[[], float] = time.monotonic) -> None:
    """Waits for a first worker, which is idle afterwards and runs the next task or actor.

    Args:
        on_this_host: whether all workers are processes of this machine; then the end of a starting one is noticed soon.
        clock: seconds.

    Raises:
        SystemFailure: no worker started within START_LIMIT_S, or the newest one ended while it started.
    """
    node: Any = ray._private.worker.global_worker.node
    logs = Path(node.get_logs_dir_path())
    deadline = clock() + START_LIMIT_S
    started = _start.remote()
    ended = False
    while not ray.wait([started], timeout=_POLL_S)[0]:
        # Seen twice: the first time the task may just have ended together with its worker.
        ended_before, ended = ended, on_this_host and _newest_worker_has_ended(logs)
        if ended and ended_before:
            raise SystemFailure(f"Ray's workers end while they start: {failure_reason(logs)}")
        if clock() > deadline:
            raise SystemFailure(f"No worker of Ray started within {START_LIMIT_S:.0f} s: {failure_reason(logs)}")
    try:
        ray.get(started)
    except RayError as error:
        raise SystemFailure(f"Ray's workers do not start: {failure_reason(logs, str(error))}") from error


@contextmanager
def explained_worker_failures() -> Iterator[None]:
    """Turns the end of an actor or a worker, for example because a library cannot be loaded there, into one sentence.

    Raises:
        SystemFailure: an actor or a worker ended, and nothing started it again.
    """
    try:
        yield
    except (RayActorError, RaySystemError, WorkerCrashedError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1][:_MAX_LENGTH].rstrip(".") if lines else type(error).__name__
        raise SystemFailure(f"A worker of Ray ended: {reason}.") from error


def failure_reason(logs: Path, fallback: str = "") -> str:
    """The line of Ray's logs that tells why a process ended, and where the logs are.

    Args:
        logs: `logs` in the folder of a Ray session; it need not exist.
        fallback: text whose last line is the reason if the logs hold none.
    """
    lines = [line for name in _RAYLET_LOGS for line in reversed(_lines(logs / name))]
    records = [record for line in lines if (record := RAY_RECORD.match(line))]
    reasons = (
        *(_message(record) for record in records if record["severity"] in "CF"),
        *_last_words(logs),
        *(_message(record) for record in records if record["severity"] == "E"),
        *reversed([line.strip() for line in fallback.splitlines() if line.strip()]),
        "no reason is logged",
    )
    return f"{reasons[0][:_MAX_LENGTH].rstrip('.')} (Ray's logs are in {logs})."


def _last_words(logs: Path) -> Iterator[str]:
    """What the shell, the dynamic linker and Python wrote, the newest line of each file first.

    Until a worker opens its own log, it writes into raylet.err.
    """
    workers = sorted(logs.glob("worker-*.err"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in (logs / "raylet.err", *workers):
        for line in reversed(_lines(path)):
            if not RAY_RECORD.match(line) and not _OTHER_LINE.match(line):
                yield line


def _message(record: re.Match[str]) -> str:
    return record["message"].rpartition("Check failed: ")[2].strip()


def _newest_worker_has_ended(logs: Path) -> bool:
    pids = _STARTED_PROCESS.findall("\n".join(_lines(logs / "raylet.out")))
    if not pids:
        return False
    try:
        os.kill(int(pids[-1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [line.strip() for line in text.splitlines() if line.strip()]
