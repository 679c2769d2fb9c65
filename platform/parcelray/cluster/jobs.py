"""Jobs on a running cluster, through Ray Jobs: list, follow and stop. These work across versions of Ray.

`submission` sends jobs, and `failures` reads why their workers failed.
"""

import asyncio
import contextlib
import datetime
import itertools
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp
import requests
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.job_submission import JobSubmissionClient

from parcelray.cluster.auth import auth_headers, find_token
from parcelray.cluster.preflight import cluster_version, dashboard_url, get_json
from parcelray.errors import SystemFailure, UserError
from parcelray.loopback import bypass_proxies_on_loopback

ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
PROBE = "versions-"
"""Prefix of the ids of the short jobs that query the versions of a cluster."""
POLL_S = 0.5
STOP_WAIT_S = 600.0
"""Time for an endpoint to finish its requests before Ray kills its driver, seconds."""
_AGENT_ATTEMPTS = 120
_AGENT_PAUSE_S = 1.0
_COLOR = re.compile(r"\x1b\[[\d;]*m")
_RAY_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}\s+(?:INFO|WARNING|DEBUG)\s+[\w.]+:\d+ -- ")
"""Start of a log line of Ray in the output of a driver: `2026-11-29 04:30:32,426 INFO job_manager.py:581 -- ...`."""


@dataclass(frozen=True)
class JobState:
    """The state of one job on the cluster."""

    submission_id: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    message: str
    """Ray's message about the status; of a job that failed, its exit code or signal and the last line of its output."""
    entrypoint: str
    started: datetime.datetime | None
    """Start time in UTC; None if the job has not started."""
    ended: datetime.datetime | None
    """End time in UTC; None if the job has not ended."""
    metadata: Mapping[str, str]
    """Metadata stored by `submission.submit`, such as user, identity, git_commit, storage and tracking_uri."""
    driver_node: str
    """Address of the node where the driver runs; empty if it is unknown."""
    ray_job_id: str
    """Ray's id of the driver, which its workers and actors carry; empty before it has joined the cluster."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the state as a JSON-serialisable dictionary; times are in ISO 8601, in UTC."""
        times = {"started": self.started, "ended": self.ended}
        return asdict(self) | {name: time and time.isoformat(timespec="seconds") for name, time in times.items()}

    @property
    def is_ended(self) -> bool:
        """Whether the status is final."""
        return self.status in ENDED

    @property
    def exit_code(self) -> int:
        """Exit code for the command line: 0 if the job succeeded, else 1."""
        return 0 if self.status == "SUCCEEDED" else 1


def list_jobs(*, address: str | None) -> list[JobState]:
    """Lists all jobs that were submitted to a cluster, newest first, without manually started drivers."""
    url, client = _connect(address)
    with explained(url):
        states = [
            _state(details)
            for details in client.list_jobs()
            # Ray may record a short job as failed after it was deleted.
            if details.submission_id and not details.submission_id.startswith(PROBE)
        ]
    oldest = datetime.datetime.min.replace(tzinfo=datetime.UTC)
    return sorted(states, key=lambda state: state.started or oldest, reverse=True)


def status(submission_id: str, *, address: str | None) -> JobState:
    """Queries the state of one job; raises UserError if the cluster has no job with this id."""
    url, client = _connect(address)
    return get_state(client, url, submission_id)


def logs(submission_id: str, *, address: str | None, follow: bool = False) -> Iterator[str]:
    """Yields the output of a job's driver in whole lines, without Ray's own log lines below the level of errors.

    Args:
        submission_id: id of the job on the cluster.
        address: address of the cluster's dashboard.
        follow: whether to continue with new output until the job ends.

    Raises:
        UserError: the cluster has no such job.
        SystemFailure: the connection was lost; the job continues.
    """
    url, client = _connect(address)
    get_state(client, url, submission_id)
    if not follow:
        with explained(url, submission_id):
            yield from _without_ray_lines([client.get_job_logs(submission_id)])
        return
    pieces = client.tail_job_logs(submission_id)

    async def next_piece() -> str | None:
        return await anext(pieces, None)

    with explained(url, submission_id), asyncio.Runner() as runner:
        yield from _without_ray_lines(iter(lambda: runner.run(next_piece()), None))


def _without_ray_lines(pieces: Iterable[str]) -> Iterator[str]:
    """Cuts pieces of output into lines, and drops those of Ray."""
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        yield from (f"{line}\n" for line in lines if not _RAY_LINE.match(line))
    if rest and not _RAY_LINE.match(rest):
        yield rest


def wait(submission_id: str, *, address: str | None, write: Callable[[str], object]) -> JobState:
    """Follows the output of a job until the job has ended.

    Args:
        submission_id: id of the job on the cluster.
        address: address of the cluster's dashboard.
        write: called with each piece of output, for example `sys.stdout.write`.

    Returns:
        The final state; its `exit_code` is 0 or 1.
    """
    for piece in logs(submission_id, address=address, follow=True):
        write(piece)
    url, client = _connect(address)
    while not (state := get_state(client, url, submission_id)).is_ended:
        time.sleep(POLL_S)
    return state


def stop(submission_id: str, *, address: str | None, timeout_s: float = STOP_WAIT_S + 60.0) -> JobState:
    """Stops a job and waits for its end; a job that has already ended is left unchanged.

    Args:
        submission_id: id of the job on the cluster.
        address: address of the cluster's dashboard.
        timeout_s: longest wait in seconds. Ray kills a driver that ignores SIGTERM after about 3 s, that of an endpoint
            after `STOP_WAIT_S`.

    Returns:
        The state at the end of the wait.
    """
    url, client = _connect(address)
    state = get_state(client, url, submission_id)
    if not state.is_ended:
        with explained(url, submission_id):
            client.stop_job(submission_id)
    deadline = time.monotonic() + timeout_s
    while not state.is_ended and time.monotonic() < deadline:
        time.sleep(POLL_S)
        state = get_state(client, url, submission_id)
    return state


def attempt_ids(submission_id: str, *, address: str | None) -> list[str]:
    """Ids of all attempts of the job that an id belongs to, oldest first."""
    url, client = _connect(address)
    attempts = attempts_of(client, url, re.sub(r"-r\d+$", "", submission_id))
    return [attempts[number].submission_id for number in sorted(attempts)]


def applications(*, address: str | None) -> dict[str, str]:
    """Status of each Serve application of a cluster, by its name: RUNNING, DEPLOYING, UNHEALTHY, ..."""
    answer = get_json(dashboard_url(address), "/api/serve/applications/", find_token())
    return {name: str(each["status"]) for name, each in answer.get("applications", {}).items()}


def _connect(address: str | None) -> tuple[str, JobSubmissionClient]:
    url = dashboard_url(address)
    token = find_token()
    cluster_version(url, token)
    return url, open_client(url, token)


def open_client(url: str, token: str | None) -> JobSubmissionClient:
    """Creates Ray's client for exactly this address and token.

    In the client, two environment variables override its argument, so they are removed while it is created. The header
    is passed explicitly because the client adds one only if RAY_AUTH_MODE was set before the import of Ray.
    """
    hidden = {name: os.environ.pop(name) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS") if name in os.environ}
    try:
        with explained(url):
            bypass_proxies_on_loopback()
            # At level INFO, which Ray sets itself, the client reports each package and each closed connection.
            for name in (
                "dashboard.modules.dashboard_sdk",
                "dashboard.modules.job.sdk",
                "_private.runtime_env.packaging",
            ):
                logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)
            return JobSubmissionClient(url, headers=auth_headers(token))
    finally:
        os.environ.update(hidden)


def start_job(client: JobSubmissionClient, details: Mapping[str, Any]) -> None:
    """Starts a job; waits for the agent of a cluster that has just started, which runs the drivers of jobs.

    Raises:
        RuntimeError: the cluster rejects the job, or no agent has started within two minutes.
    """
    for attempt in itertools.count(1):
        try:
            client.submit_job(**details)
        except RuntimeError as error:
            if "No available agent" not in str(error) or attempt == _AGENT_ATTEMPTS:
                raise
            time.sleep(_AGENT_PAUSE_S)
        else:
            return


def attempts_of(client: JobSubmissionClient, url: str, submission_id: str) -> dict[int, JobState]:
    """The attempts of a job, by their number.

    Args:
        client: Ray's client.
        url: URL of the dashboard.
        submission_id: id of the first attempt, without the suffix `-rN`.
    """
    numbered = re.compile(re.escape(submission_id) + r"(?:-r(\d+))?")
    with explained(url):
        return {
            int(match[1] or 1): _state(details)
            for details in client.list_jobs()
            if (match := numbered.fullmatch(details.submission_id or ""))
        }


def get_state(client: JobSubmissionClient, url: str, submission_id: str) -> JobState:
    """The state of one job; raises UserError if the cluster has no job with this id."""
    with explained(url, submission_id):
        return _state(client.get_job_info(submission_id))


def _state(details: JobDetails) -> JobState:
    return JobState(
        submission_id=details.submission_id or "",
        status=str(details.status),
        message=_message(details),
        entrypoint=details.entrypoint,
        started=_time(details.start_time),
        ended=_time(details.end_time),
        metadata=dict(details.metadata or {}),
        driver_node=details.driver_info.node_ip_address if details.driver_info else "",
        ray_job_id=details.job_id or "",
    )


def _message(details: JobDetails) -> str:
    lines = [line.strip() for line in (details.message or "").splitlines() if line.strip()]
    if len(lines) > 1 and "last available logs" in lines[0]:
        code = details.driver_exit_code
        reason = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return f"{reason}: {_COLOR.sub('', lines[-1])}"
    return lines[0] if lines else ""


def _time(milliseconds: int | None) -> datetime.datetime | None:
    return datetime.datetime.fromtimestamp(milliseconds / 1000, tz=datetime.UTC) if milliseconds else None


@contextlib.contextmanager
def explained(url: str, submission_id: str = "") -> Iterator[None]:
    """Turns the errors of Ray's client into one-sentence errors."""
    try:
        yield
    except (requests.RequestException, aiohttp.ClientError, ConnectionError) as error:
        raise SystemFailure(
            f"The connection to {url} was lost ({type(error).__name__}); submitted jobs continue, see `parcelray jobs"
            " list`."
        ) from error
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if "status code 404" in text:
            raise UserError(f"There is no job {submission_id} on {url}; `parcelray jobs list` lists all.") from error
        raise SystemFailure(f"The cluster at {url} failed on this request: {text[:500]}") from error
