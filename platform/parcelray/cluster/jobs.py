"""Jobs on a running cluster, through Ray Jobs: submit, list, follow and stop.

A job is sent with the files of its project. Its id is the identity of the job file, `<kind>-<name>-<hash8>`, so
submitting the same job twice returns the existing job. Ray runs each id only once. After a failure or a stop, a new
attempt therefore has the id `<identity>-r2`, `-r3`, ...; the run inside keeps its identity and resumes from its
checkpoints. Listing, logs and stopping work across versions of Ray; submitting does not.
"""

import asyncio
import contextlib
import datetime
import getpass
import itertools
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import requests
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.job_submission import JobSubmissionClient
from rich.table import Table

from parcelray.cluster.auth import auth_headers, find_token
from parcelray.cluster.package import (
    MAX_PACKAGE_BYTES,
    Package,
    collect,
    find_secret,
    git_state,
    inside,
    project_root,
    stage,
)
from parcelray.cluster.preflight import check_cluster, cluster_version, dashboard_url
from parcelray.config.loader import command_of
from parcelray.errors import SystemFailure, UserError
from parcelray.loopback import bypass_proxies_on_loopback

ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
POLL_S = 0.5
_AGENT_ATTEMPTS = 120
_AGENT_PAUSE_S = 1.0
PACKAGE_FOLDER = Path("platform") / "parcelray"

_IDENTITY = re.compile(r"(?P<kind>[a-z]+)-[A-Za-z0-9._-]+-(?P<hash>[0-9a-f]{8})")
_SECRET_VARIABLE = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY", re.IGNORECASE)


@dataclass(frozen=True)
class SubmittedJob:
    """The result of a submission."""

    submission_id: str
    """Id of the job on the cluster: the identity, with the suffix `-rN` from the second attempt on."""
    created: bool
    """False if a job with this identity already existed and nothing was sent."""
    status: str
    """Ray's job status: PENDING, RUNNING, SUCCEEDED (of an existing job), ..."""
    message: str
    """One sentence for the user."""


@dataclass(frozen=True)
class Submission:
    """The plan of a submission: what would be sent where."""

    identity: str
    entrypoint: str
    """Shell command that runs in the root of the project's copy."""
    address: str
    """URL of the cluster's dashboard."""
    num_files: int
    num_bytes: int
    largest: dict[str, int]
    """Sizes of the five largest files in bytes."""
    git_commit: str
    git_dirty: bool
    """Whether tracked files differ from the commit; the files are sent as they are on disk."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as a JSON-serialisable dictionary."""
        return asdict(self)

    def to_rich(self) -> Table:
        """Returns the plan as a table for the console."""
        table = Table("job to submit", self.identity)
        table.add_row("cluster", self.address)
        table.add_row("command", self.entrypoint)
        table.add_row("files", f"{self.num_files} git-tracked files ({self.num_bytes / 2**20:.1f} MiB)")
        table.add_row("largest", "\n".join(f"{name} ({size / 2**20:.2f} MiB)" for name, size in self.largest.items()))
        table.add_row("commit", self.git_commit + (", with uncommitted changes" if self.git_dirty else ""))
        return table


@dataclass(frozen=True)
class JobState:
    """The state of one job on the cluster."""

    submission_id: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    message: str
    """First line of Ray's message about the status."""
    entrypoint: str
    started: datetime.datetime | None
    """Start time in UTC; None if the job has not started."""
    ended: datetime.datetime | None
    """End time in UTC; None if the job has not ended."""
    metadata: Mapping[str, str]
    """Metadata stored by `submit`: user, identity, config_hash, git_commit, git_dirty, job_file, attempt."""

    @property
    def is_ended(self) -> bool:
        """Whether the status is final."""
        return self.status in ENDED

    @property
    def exit_code(self) -> int:
        """Exit code for the command line: 0 if the job succeeded, else 1."""
        return 0 if self.status == "SUCCEEDED" else 1


def submit(
    job_file: Path,
    *,
    identity: str,
    address: str | None,
    overrides: Sequence[str] = (),
    entrypoint: str | None = None,
    env_vars: Mapping[str, str] | None = None,
    again: bool = False,
    max_package_bytes: int = MAX_PACKAGE_BYTES,
) -> SubmittedJob:
    """Sends a job file and the git-tracked files of its project to a cluster, without waiting for the job's end.

    Args:
        job_file: a file inside the project; git need not track it.
        identity: `<kind>-<name>-<hash8>` of the resolved configuration.
        address: address of the cluster's dashboard, see `preflight.dashboard_url`.
        overrides: `a.b=c` texts, passed to the command as `--set`.
        entrypoint: shell command to run instead of `parcelray <kind> <job file>`, in the root of the project's copy.
        env_vars: environment variables of the job. Names of secrets are rejected, as anyone with permission to list
            jobs can read the variables.
        again: whether to start a new attempt of a job that succeeded. A running job is never duplicated.
        max_package_bytes: limit for the size of the package in bytes.

    Raises:
        UserError: the cluster cannot be used, the package is rejected, or an argument is illegal.
        SystemFailure: the cluster failed on a legal request.
    """
    match = _matched(identity)
    _check_public(overrides, env_vars or {})
    root = project_root(job_file)
    name = inside(root, job_file)
    package = collect(root, [job_file], max_bytes=max_package_bytes)

    url = dashboard_url(address)
    token = find_token()
    check_cluster(url, token)
    client = _client(url, token)
    existing, attempt = _attempts(client, url, identity, again)
    if existing is not None:
        return _existing(existing)

    commit, dirty = git_state(root)
    metadata = {
        "user": _user(),
        "identity": identity,
        "config_hash": match["hash"],
        "git_commit": commit,
        "git_dirty": str(dirty).lower(),
        "job_file": name,
        "attempt": str(attempt),
    }
    request = {
        "submission_id": identity if attempt == 1 else f"{identity}-r{attempt}",
        "entrypoint": entrypoint or build_entrypoint(match["kind"], name, overrides),
        "metadata": metadata,
    }
    return _send(client, url, package, request, env_vars or {})


def plan_submission(job_file: Path, *, identity: str, address: str | None, overrides: Sequence[str] = ()) -> Submission:
    """Plans a submission without contacting the cluster; raises UserError where `submit` would."""
    match = _matched(identity)
    _check_public(overrides, {})
    root = project_root(job_file)
    package = collect(root, [job_file])
    commit, dirty = git_state(root)
    largest = sorted(package.files, key=lambda file: -file.num_bytes)[:5]
    return Submission(
        identity=identity,
        entrypoint=build_entrypoint(match["kind"], inside(root, job_file), overrides),
        address=dashboard_url(address),
        num_files=len(package.files),
        num_bytes=package.num_bytes,
        largest={file.name: file.num_bytes for file in largest},
        git_commit=commit,
        git_dirty=dirty,
    )


def build_entrypoint(kind: str, job_file: str, overrides: Sequence[str] = ()) -> str:
    """Builds the quoted shell command that a job runs in the root of the project's copy."""
    settings = [part for override in overrides for part in ("--set", override)]
    # A search resumes the trials of an earlier attempt only with this flag; all other kinds always resume.
    resume = ["--resume"] if kind == "tune" else []
    return shlex.join(["python", "-m", "parcelray.cli", *command_of(kind).split(), job_file, *settings, *resume])


def list_jobs(*, address: str | None) -> list[JobState]:
    """Lists all jobs that were submitted to a cluster, newest first, without manually started drivers."""
    url, client = _connect(address)
    with _explained(url):
        states = [_state(details) for details in client.list_jobs() if details.submission_id]
    oldest = datetime.datetime.min.replace(tzinfo=datetime.UTC)
    return sorted(states, key=lambda state: state.started or oldest, reverse=True)


def status(submission_id: str, *, address: str | None) -> JobState:
    """Queries the state of one job; raises UserError if the cluster has no job with this id."""
    url, client = _connect(address)
    return _get_state(client, url, submission_id)


def logs(submission_id: str, *, address: str | None, follow: bool = False) -> Iterator[str]:
    """Yields the output of a job's driver in pieces, to be written without additional newlines.

    Args:
        submission_id: id of the job on the cluster.
        address: address of the cluster's dashboard.
        follow: whether to continue with new output until the job ends.

    Raises:
        UserError: the cluster has no such job.
        SystemFailure: the connection was lost; the job continues.
    """
    url, client = _connect(address)
    _get_state(client, url, submission_id)
    if not follow:
        with _explained(url, submission_id):
            yield client.get_job_logs(submission_id)
        return
    pieces = client.tail_job_logs(submission_id)

    async def next_piece() -> str | None:
        return await anext(pieces, None)

    with _explained(url, submission_id), asyncio.Runner() as runner:
        while (piece := runner.run(next_piece())) is not None:
            yield piece


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
    while not (state := _get_state(client, url, submission_id)).is_ended:
        time.sleep(POLL_S)
    return state


def stop(submission_id: str, *, address: str | None, timeout_s: float = 30.0) -> JobState:
    """Stops a job and waits for its end; a job that has already ended is left unchanged.

    Args:
        submission_id: id of the job on the cluster.
        address: address of the cluster's dashboard.
        timeout_s: longest wait in seconds. Ray kills a driver that ignores SIGTERM after about 3 s.

    Returns:
        The state at the end of the wait.
    """
    url, client = _connect(address)
    state = _get_state(client, url, submission_id)
    if not state.is_ended:
        with _explained(url, submission_id):
            client.stop_job(submission_id)
    deadline = time.monotonic() + timeout_s
    while not state.is_ended and time.monotonic() < deadline:
        time.sleep(POLL_S)
        state = _get_state(client, url, submission_id)
    return state


def _connect(address: str | None) -> tuple[str, JobSubmissionClient]:
    url = dashboard_url(address)
    token = find_token()
    cluster_version(url, token)
    return url, _client(url, token)


def _client(url: str, token: str | None) -> JobSubmissionClient:
    """Creates Ray's client for exactly this address and token.

    In the client, two environment variables override its argument, so they are removed while it is created. The header
    is passed explicitly because the client adds one only if RAY_AUTH_MODE was set before the import of Ray.
    """
    hidden = {name: os.environ.pop(name) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS") if name in os.environ}
    try:
        with _explained(url):
            bypass_proxies_on_loopback()
            return JobSubmissionClient(url, headers=auth_headers(token))
    finally:
        os.environ.update(hidden)


def _attempts(client: JobSubmissionClient, url: str, identity: str, again: bool) -> tuple[JobState | None, int]:
    """Returns the latest attempt, or None if a new attempt is to be started, and the number of the next attempt."""
    numbered = re.compile(re.escape(identity) + r"(?:-r(\d+))?")
    with _explained(url):
        known = {
            int(match[1] or 1): _state(details)
            for details in client.list_jobs()
            if (match := numbered.fullmatch(details.submission_id or ""))
        }
    if not known:
        return None, 1
    latest = max(known)
    replaceable = {"FAILED", "STOPPED"} | ({"SUCCEEDED"} if again else set())
    return (None if known[latest].status in replaceable else known[latest]), latest + 1


def _send(
    client: JobSubmissionClient, url: str, package: Package, request: dict[str, Any], env_vars: Mapping[str, str]
) -> SubmittedJob:
    submission_id = request["submission_id"]
    with tempfile.TemporaryDirectory(prefix="parcelray-") as scratch, _explained(url, submission_id):
        folder = Path(scratch) / "project"
        folder.mkdir()
        stage(package, folder)
        runtime_env: dict[str, Any] = {"working_dir": str(folder), "env_vars": {"PYTHONUNBUFFERED": "1", **env_vars}}
        if (folder / PACKAGE_FOLDER).is_dir():
            # This puts the package on the PYTHONPATH of every node. The entry `platform` would only work for the
            # driver, as workers start in another folder.
            runtime_env |= {"py_modules": [str(folder / PACKAGE_FOLDER)], "excludes": [f"/{PACKAGE_FOLDER.as_posix()}"]}
        try:
            _submit_once_an_agent_runs(client, {**request, "runtime_env": runtime_env})
        except RuntimeError as error:
            # The same job was submitted by someone else after the check for existing attempts.
            if "already exists" not in str(error):
                raise
            return _existing(_get_state(client, url, submission_id))
    return SubmittedJob(
        submission_id=submission_id,
        created=True,
        status="PENDING",
        message=(
            f"Submitted {submission_id} with {len(package.files)} files ({package.num_bytes / 1024**2:.1f} MiB) to"
            f" {url}."
        ),
    )


def _submit_once_an_agent_runs(client: JobSubmissionClient, request: dict[str, Any]) -> None:
    """Submits a job; waits for the agent of a cluster that has just started, which runs the drivers of jobs."""
    for attempt in itertools.count(1):
        try:
            client.submit_job(**request)
        except RuntimeError as error:
            if "No available agent" not in str(error) or attempt == _AGENT_ATTEMPTS:
                raise
            time.sleep(_AGENT_PAUSE_S)
        else:
            return


def _existing(state: JobState) -> SubmittedJob:
    remedy = (
        "start a new attempt with --again" if state.status == "SUCCEEDED" else "follow or stop it with `parcelray jobs`"
    )
    return SubmittedJob(
        submission_id=state.submission_id,
        created=False,
        status=state.status,
        message=f"{state.submission_id} already exists with status {state.status}; nothing was sent ({remedy}).",
    )


def _matched(identity: str) -> re.Match[str]:
    match = _IDENTITY.fullmatch(identity)
    if match is None:
        raise UserError(
            f"{identity} is not the identity of a job; legal: KIND-NAME-HASH8 with letters, digits, '.', '_' and '-',"
            " for example train-nlvr-0a1b2c3d."
        )
    return match


def _check_public(overrides: Sequence[str], env_vars: Mapping[str, str]) -> None:
    """Rejects secrets in settings that anyone with permission to list jobs can read."""
    for name in env_vars:
        if _SECRET_VARIABLE.search(name):
            raise UserError(
                f"{name} looks like a secret, and anyone with permission to list jobs could read it; set it in the"
                " environment of the cluster's nodes instead."
            )
    for text in (*overrides, *env_vars.values()):
        if find_secret(text.encode()):
            raise UserError(
                "A setting contains text that looks like an access token or a private key, and anyone with permission"
                " to list jobs could read it; remove it."
            )


def _get_state(client: JobSubmissionClient, url: str, submission_id: str) -> JobState:
    with _explained(url, submission_id):
        return _state(client.get_job_info(submission_id))


def _state(details: JobDetails) -> JobState:
    message = (details.message or "").strip()
    return JobState(
        submission_id=details.submission_id or "",
        status=str(details.status),
        message=message.splitlines()[0] if message else "",
        entrypoint=details.entrypoint,
        started=_time(details.start_time),
        ended=_time(details.end_time),
        metadata=dict(details.metadata or {}),
    )


def _time(milliseconds: int | None) -> datetime.datetime | None:
    return datetime.datetime.fromtimestamp(milliseconds / 1000, tz=datetime.UTC) if milliseconds else None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # In a container, the user may have no entry in /etc/passwd.
        return f"uid-{os.getuid()}"


@contextlib.contextmanager
def _explained(url: str, submission_id: str = "") -> Iterator[None]:
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
