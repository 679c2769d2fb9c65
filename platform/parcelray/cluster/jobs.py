"""Jobs on a running cluster, through Ray Jobs: send a job file with the files of its project, then list, follow and stop.

A job's id is its identity, `<kind>-<name>-<hash8>`, so sending the same job twice gives the job that is there. A job
that failed or was stopped cannot be started again under its id (Ray runs an id once), so a new attempt is
`<identity>-r2`, `-r3`, ...; the run inside has the same identity and resumes from its checkpoints. Listing, logs and
stopping work across versions of Ray; sending does not.
"""

import asyncio
import contextlib
import datetime
import getpass
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

ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
POLL_S = 0.5
PACKAGE_FOLDER = Path("platform") / "parcelray"

_IDENTITY = re.compile(r"(?P<kind>[a-z]+)-[A-Za-z0-9._-]+-(?P<hash>[0-9a-f]{8})")
_SECRET_VARIABLE = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY", re.IGNORECASE)


@dataclass(frozen=True)
class SubmittedJob:
    """What became of a submission."""

    submission_id: str
    """Id of the job on the cluster: the identity, with `-rN` from the second attempt on."""
    created: bool
    """False if a job of this identity was there and nothing was sent."""
    status: str
    """PENDING, RUNNING, SUCCEEDED (of an existing job), ..."""
    message: str
    """One sentence for the user."""


@dataclass(frozen=True)
class Submission:
    """What a submission would send."""

    identity: str
    entrypoint: str
    """Shell command in the root of the project's copy."""
    address: str
    """URL of the cluster's dashboard."""
    num_files: int
    num_bytes: int
    largest: dict[str, int]
    """The five largest files, bytes."""
    git_commit: str
    git_dirty: bool
    """Whether tracked files differ from the commit; what is sent is what is on disk."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return asdict(self)

    def to_rich(self) -> Table:
        """For the console."""
        table = Table("would be sent", self.identity)
        table.add_row("to", self.address)
        table.add_row("command", self.entrypoint)
        table.add_row("files", f"{self.num_files} ({self.num_bytes / 2**20:.1f} MiB), what git tracks")
        table.add_row("largest", "\n".join(f"{name} ({size / 2**20:.2f} MiB)" for name, size in self.largest.items()))
        table.add_row("commit", self.git_commit + (", with changes" if self.git_dirty else ""))
        return table


@dataclass(frozen=True)
class JobState:
    """One job as the cluster sees it."""

    submission_id: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    message: str
    """Ray's own words on the status; the first line."""
    entrypoint: str
    started: datetime.datetime | None
    """UTC; None before the cluster has it."""
    ended: datetime.datetime | None
    metadata: Mapping[str, str]
    """What `submit` stored: user, identity, config_hash, git_commit, git_dirty, job_file, attempt."""

    @property
    def is_ended(self) -> bool:
        """Whether the status is final."""
        return self.status in ENDED

    @property
    def exit_code(self) -> int:
        """0 if the job succeeded, else 1."""
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
    """Sends a job file, with the git-tracked files of its project, to a cluster; returns without waiting for the end.

    Args:
        job_file: a file inside the project; git need not track it.
        identity: `<kind>-<name>-<hash8>` from the resolved configuration.
        address: the cluster's dashboard, see `preflight.dashboard_url`.
        overrides: `a.b=c` texts, handed on as `--set`.
        entrypoint: shell command to run instead of `parcelray <kind> <job file>`, in the root of the project's copy.
        env_vars: environment variables for the job. Anyone who may list jobs can read them, so names of secrets are
            refused.
        again: start a new attempt although this job succeeded; a job that still runs is never doubled.
        max_package_bytes: limit of the package.

    Raises:
        UserError: the cluster cannot be used, the package is refused, or an argument is illegal.
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
    """What `submit` would send, without asking the cluster; raises UserError where the package or an argument would be refused."""
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
    """The shell command that a job runs in the root of the project's copy; every part is quoted."""
    settings = [part for override in overrides for part in ("--set", override)]
    # A second attempt of a search finds the trials of the first; every other kind goes on by itself.
    goes_on = ["--resume"] if kind == "tune" else []
    return shlex.join(["python", "-m", "parcelray.cli", *command_of(kind).split(), job_file, *settings, *goes_on])


def list_jobs(*, address: str | None) -> list[JobState]:
    """All jobs that were submitted to a cluster, newest first; drivers that were started by hand are left out."""
    url, client = _connect(address)
    with _explained(url):
        states = [_state(details) for details in client.list_jobs() if details.submission_id]
    oldest = datetime.datetime.min.replace(tzinfo=datetime.UTC)
    return sorted(states, key=lambda state: state.started or oldest, reverse=True)


def status(submission_id: str, *, address: str | None) -> JobState:
    """The state of one job; raises UserError for an id that the cluster does not know."""
    url, client = _connect(address)
    return _get_state(client, url, submission_id)


def logs(submission_id: str, *, address: str | None, follow: bool = False) -> Iterator[str]:
    """The output of a job's driver, in pieces that end where they end (write them without adding newlines).

    Args:
        submission_id: the job's id on the cluster.
        address: the cluster's dashboard.
        follow: keep giving what comes, until the job ends.

    Raises:
        UserError: no such job.
        SystemFailure: the connection broke; the job goes on.
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
    """Follows a job's output until it has ended.

    Args:
        submission_id: the job's id on the cluster.
        address: the cluster's dashboard.
        write: takes each piece of output, for example `sys.stdout.write`.

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
    """Asks a job to stop and waits for it; a job that has ended is left as it is.

    Args:
        submission_id: the job's id on the cluster.
        address: the cluster's dashboard.
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
    """Ray's client for exactly this address and token.

    The client lets two environment variables win over its argument, so they are hidden from it; and the header is given
    explicitly because the client adds one only if RAY_AUTH_MODE was set before Ray was imported.
    """
    hidden = {name: os.environ.pop(name) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS") if name in os.environ}
    try:
        with _explained(url):
            return JobSubmissionClient(url, headers=auth_headers(token))
    finally:
        os.environ.update(hidden)


def _attempts(client: JobSubmissionClient, url: str, identity: str, again: bool) -> tuple[JobState | None, int]:
    """The latest attempt if it stands for this submission, else None, and the number that the next attempt gets."""
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
            # On every node this puts the package on PYTHONPATH. A PYTHONPATH of `platform` would only serve the driver:
            # workers start in another folder.
            runtime_env |= {"py_modules": [str(folder / PACKAGE_FOLDER)], "excludes": [f"/{PACKAGE_FOLDER.as_posix()}"]}
        try:
            client.submit_job(**request, runtime_env=runtime_env)
        except RuntimeError as error:
            # Someone else sent the same job since we looked.
            if "already exists" not in str(error):
                raise
            return _existing(_get_state(client, url, submission_id))
    return SubmittedJob(
        submission_id=submission_id,
        created=True,
        status="PENDING",
        message=(
            f"Sent {submission_id} with {len(package.files)} files ({package.num_bytes / 1024**2:.1f} MiB) to {url}."
        ),
    )


def _existing(state: JobState) -> SubmittedJob:
    remedy = (
        "run with --again for a new attempt"
        if state.status == "SUCCEEDED"
        else "follow or stop it with `parcelray jobs`"
    )
    return SubmittedJob(
        submission_id=state.submission_id,
        created=False,
        status=state.status,
        message=f"{state.submission_id} is already on the cluster and {state.status}; nothing was sent ({remedy}).",
    )


def _matched(identity: str) -> re.Match[str]:
    match = _IDENTITY.fullmatch(identity)
    if match is None:
        raise UserError(
            f"{identity} is not a job's identity; legal is KIND-NAME-HASH8 with letters, digits, '.', '_' and '-', as"
            " in train-nlvr-0a1b2c3d."
        )
    return match


def _check_public(overrides: Sequence[str], env_vars: Mapping[str, str]) -> None:
    for name in env_vars:
        if _SECRET_VARIABLE.search(name):
            raise UserError(
                f"{name} looks like a secret, and anyone who may list jobs could read it; set it in the cluster's own"
                " environment instead."
            )
    for text in (*overrides, *env_vars.values()):
        if find_secret(text.encode()):
            raise UserError(
                "A setting holds what looks like an access token or a private key, and anyone who may list jobs could"
                " read it; take it out."
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
        # A container without an entry in /etc/passwd.
        return f"uid-{os.getuid()}"


@contextlib.contextmanager
def _explained(url: str, submission_id: str = "") -> Iterator[None]:
    """Turns the errors of Ray's client into sentences."""
    try:
        yield
    except (requests.RequestException, aiohttp.ClientError, ConnectionError) as error:
        raise SystemFailure(
            f"The connection to {url} broke ({type(error).__name__}); what was sent before goes on, see `parcelray jobs"
            " list`."
        ) from error
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if "status code 404" in text:
            raise UserError(f"There is no job {submission_id} on {url}; `parcelray jobs list` shows all.") from error
        raise SystemFailure(f"The cluster at {url} failed on this request: {text[:500]}") from error
