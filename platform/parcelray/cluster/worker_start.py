"""Start of Ray's workers: waits for the first one, and reports in one sentence why a worker did not start or died."""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RaySystemError, WorkerCrashedError

from parcelray.errors import SystemFailure

START_LIMIT_S = 90.0
"""Time limit for the start of the first worker, seconds. Including the start of Ray, a failure takes two minutes."""
_POLL_S = 1.0
_STARTED_PROCESS = re.compile(r"Started worker process with pid (\d+)")
RAY_RECORD = re.compile(r"\[\d{4}-[^\]]* (?P<severity>[A-Z]) \d+ \d+\](?P<message>.*)")
"""A log record of Ray's C++ part: `[2026-11-29 04:30:32,426 E 5337 5337] (raylet) worker_pool.cc:660: message`.

The severities of failures are E, C and F.
"""
# Lines without a reason: a started worker first writes its job and actor, and stack traces have an address per line.
_OTHER_LINE = re.compile(r":(job_id|actor_name|task_name):|\*\*\* |.*\[0x[0-9a-f]+\]")
_RAYLET_LOGS = ("raylet.err", "raylet.out", "gcs_server.err", "gcs_server.out")
_MAX_LENGTH = 400


@ray.remote(num_cpus=0)
def _start() -> None:
    """A task that runs as soon as a worker has started."""


@ray.remote(num_cpus=0)
class _Echo:
    def answer(self) -> str:
        return "an answer"


def actor_round_trip() -> None:
    """Starts an actor and waits for an answer from it.

    Raises:
        SystemFailure: there was no answer within START_LIMIT_S.
    """
    actor = _Echo.remote()  # type: ignore[attr-defined]
    try:
        ray.get(actor.answer.remote(), timeout=START_LIMIT_S)
    except GetTimeoutError as error:
        raise SystemFailure(
            f"An actor did not answer within {START_LIMIT_S:.0f} s; run the check again when the machine is less busy."
        ) from error
    finally:
        ray.kill(actor)


def await_worker(*, on_this_host: bool, clock: Callable[[], float] = time.monotonic) -> None:
    """Waits for the first worker. It is idle afterwards and runs the next task or actor.

    Args:
        on_this_host: whether all workers are processes of this machine. The death of a starting worker is then detected
            at once.
        clock: gives the time in seconds.

    Raises:
        SystemFailure: no worker started within START_LIMIT_S, or the newest one died while it started.
    """
    node: Any = ray._private.worker.global_worker.node
    logs = Path(node.get_logs_dir_path())
    deadline = clock() + START_LIMIT_S
    started = _start.remote()
    ended = False
    while not ray.wait([started], timeout=_POLL_S)[0]:
        # Required twice in a row: the first time, the task and its worker may just have ended together.
        ended_before, ended = ended, on_this_host and _newest_worker_has_ended(logs)
        if ended and ended_before:
            raise SystemFailure(f"Ray's workers die while they start: {failure_reason(logs)}")
        if clock() > deadline:
            raise SystemFailure(f"No Ray worker started within {START_LIMIT_S:.0f} s: {failure_reason(logs)}")
    try:
        ray.get(started)
    except RayError as error:
        raise SystemFailure(f"Ray's workers do not start: {failure_reason(logs, str(error))}") from error


@contextmanager
def explained_worker_failures() -> Iterator[None]:
    """Turns the death of an actor or worker, for example because a library is missing, into a one-sentence error.

    Raises:
        SystemFailure: an actor or worker died and was not restarted.
    """
    try:
        yield
    except (RayActorError, RaySystemError, WorkerCrashedError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1][:_MAX_LENGTH].rstrip(".") if lines else type(error).__name__
        raise SystemFailure(f"A Ray worker died: {reason}.") from error


def failure_reason(logs: Path, fallback: str = "") -> str:
    """Finds the line in Ray's logs with the reason why a process ended, and adds the path of the logs.

    Args:
        logs: folder `logs` of a Ray session; it need not exist.
        fallback: text whose last line is the reason if the logs contain none.
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
    """Yields the output of shell, dynamic linker and Python, the newest line of each file first.

    A worker writes to raylet.err until it opens its own log.
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
