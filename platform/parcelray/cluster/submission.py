"""Submission of jobs to a running cluster, through Ray Jobs.

A job is sent with the files of its project. Its id is the identity of the job file, `<kind>-<name>-<hash8>`, so
submitting the same job twice returns the existing job. Ray runs each id only once. After a failure or a stop, a new
attempt therefore has the id `<identity>-r2`, `-r3`, ...; the run inside keeps its identity and resumes from its
checkpoints. Both sides must have the same version of Ray.
"""

import getpass
import itertools
import os
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ray.job_submission import JobSubmissionClient
from rich.table import Table

from parcelray.cluster.auth import find_token
from parcelray.cluster.jobs import STOP_WAIT_S, JobState, attempts_of, explained, get_state, open_client, start_job
from parcelray.cluster.package import Package, collect, git_state, inside, project_root, secret_settings, stage
from parcelray.cluster.preflight import check_cluster, dashboard_url
from parcelray.cluster.versions import check_versions, needs_of, query_versions
from parcelray.config.loader import command_of
from parcelray.errors import UserError

PIPELINE = "pipeline"
"""Kind of a submitted script of pipelines/; the other kinds are those of job files."""
PACKAGE_FOLDER = Path("platform") / "parcelray"

_IDENTITY = re.compile(r"(?P<kind>[a-z]+)-[A-Za-z0-9._-]+-(?P<hash>[0-9a-f]{8})")


@dataclass(frozen=True)
class JobRequest:
    """A job to submit."""

    file: Path
    """Job file or script inside the project; git need not track it."""
    identity: str
    """`<kind>-<name>-<hash8>` of the resolved configuration."""
    overrides: Sequence[str] = ()
    """`a.b=c` texts, passed to the command as `--set`."""
    flags: Sequence[str] = ()
    """Further arguments of the command, such as `--confirm`; a job with other flags is another job."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The resolved job with paths as they were written; it is checked for secrets."""
    further: Sequence[Path] = ()
    """Files inside the project that the job reads and that git need not track."""

    @property
    def submission_id(self) -> str:
        """Id of the first attempt on the cluster."""
        return self.identity + "".join(flag.removeprefix("-") for flag in self.flags)

    @property
    def storage(self) -> str:
        """Storage of the job; empty if it has none."""
        return str(self.settings.get("storage") or "")

    @property
    def tracking_uri(self) -> str:
        """MLflow store of the job; empty if it has none."""
        return str((self.settings.get("tracking") or {}).get("uri") or "")


@dataclass(frozen=True)
class SubmittedJob:
    """The result of a submission."""

    submission_id: str
    """Id of the job on the cluster: that of the request, with the suffix `-rN` from the second attempt on."""
    created: bool
    """False if a job with this identity already existed and nothing was sent."""
    status: str
    """Ray's job status: PENDING, RUNNING, SUCCEEDED (of an existing job), ..."""
    message: str
    """One sentence for the user."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as a JSON-serialisable dictionary."""
        return asdict(self)


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


def submit(
    request: JobRequest,
    *,
    address: str | None,
    entrypoint: str | None = None,
    env_vars: Mapping[str, str] | None = None,
    again: bool = False,
) -> SubmittedJob:
    """Sends a job and the git-tracked files of its project to a cluster, without waiting for the job's end.

    Args:
        request: the job.
        address: address of the cluster's dashboard, see `preflight.dashboard_url`.
        entrypoint: shell command to run instead of that of the job, in the root of the project's copy.
        env_vars: environment variables of the job. Names of secrets are rejected, as anyone with permission to list
            jobs can read the variables.
        again: whether to start a new attempt of a job that succeeded. A running job is never duplicated.

    Raises:
        UserError: the cluster cannot be used or run the job, the package is rejected, or an argument is illegal.
        SystemFailure: the cluster failed on a legal request.
    """
    match = _matched(request.identity)
    _check_public(request, env_vars or {})
    root = project_root(request.file)
    package = collect(root, [request.file, *request.further])

    url = dashboard_url(address)
    token = find_token()
    check_cluster(url, token)
    client = open_client(url, token)
    existing, attempt = _next_attempt(client, url, request.submission_id, again)
    if existing is not None:
        return _existing(existing)
    needs = needs_of(root, package_is_sent=_has_package(package))
    if needs is not None:
        with explained(url):
            check_versions(needs, query_versions(client), url)

    commit, dirty = git_state(root)
    metadata = {
        "user": _user(),
        "identity": request.identity,
        "config_hash": match["hash"],
        "git_commit": commit,
        "git_dirty": str(dirty).lower(),
        "job_file": inside(root, request.file),
        "attempt": str(attempt),
        "storage": request.storage,
        "tracking_uri": request.tracking_uri,
    }
    details = {
        "submission_id": request.submission_id if attempt == 1 else f"{request.submission_id}-r{attempt}",
        "entrypoint": entrypoint or build_entrypoint(request, root),
        "metadata": metadata,
    }
    return _send(client, url, package, details, driver_variables(match["kind"], env_vars or {}))


def driver_variables(kind: str, env_vars: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment variables of a job: the given ones, and those that its kind needs."""
    # Ray kills a driver 3 s after SIGTERM, but an endpoint finishes its requests first.
    wait = {"RAY_JOB_STOP_WAIT_TIME_S": f"{STOP_WAIT_S:.0f}"} if kind == "serve" else {}
    return {"PYTHONUNBUFFERED": "1", **wait, **env_vars}


def plan_submission(request: JobRequest, *, address: str | None) -> Submission:
    """Plans a submission without contacting the cluster; raises UserError where `submit` would."""
    _matched(request.identity)
    _check_public(request, {})
    root = project_root(request.file)
    package = collect(root, [request.file, *request.further])
    commit, dirty = git_state(root)
    largest = sorted(package.files, key=lambda file: -file.num_bytes)[:5]
    return Submission(
        identity=request.identity,
        entrypoint=build_entrypoint(request, root),
        address=dashboard_url(address),
        num_files=len(package.files),
        num_bytes=package.num_bytes,
        largest={file.name: file.num_bytes for file in largest},
        git_commit=commit,
        git_dirty=dirty,
    )


def build_entrypoint(request: JobRequest, root: Path) -> str:
    """Builds the quoted shell command that a job runs in the root of the project's copy."""
    kind, name = _matched(request.identity)["kind"], inside(root, request.file)
    settings = [part for override in request.overrides for part in ("--set", override)]
    if kind == PIPELINE:
        return shlex.join(["python", name, *settings, *request.flags])
    # A search resumes the trials of an earlier attempt only with this flag; all other kinds always resume.
    flags = [*(["--resume"] if kind == "tune" else []), *request.flags]
    return shlex.join(["python", "-m", "parcelray.cli", *command_of(kind).split(), name, *settings, *flags])


def _next_attempt(
    client: JobSubmissionClient, url: str, submission_id: str, again: bool
) -> tuple[JobState | None, int]:
    """Returns the latest attempt, or None if a new attempt is to be started, and the number of the next attempt."""
    known = attempts_of(client, url, submission_id)
    if not known:
        return None, 1
    latest = max(known)
    replaceable = {"FAILED", "STOPPED"} | ({"SUCCEEDED"} if again else set())
    return (None if known[latest].status in replaceable else known[latest]), latest + 1


def _send(
    client: JobSubmissionClient, url: str, package: Package, details: dict[str, Any], env_vars: Mapping[str, str]
) -> SubmittedJob:
    submission_id = details["submission_id"]
    with tempfile.TemporaryDirectory(prefix="parcelray-") as scratch, explained(url, submission_id):
        folder = Path(scratch) / "project"
        folder.mkdir()
        stage(package, folder)
        runtime_env: dict[str, Any] = {"working_dir": str(folder), "env_vars": dict(env_vars)}
        if _has_package(package):
            # This puts the package on the PYTHONPATH of every node. The entry `platform` would only work for the
            # driver, as workers start in another folder.
            runtime_env |= {"py_modules": [str(folder / PACKAGE_FOLDER)], "excludes": [f"/{PACKAGE_FOLDER.as_posix()}"]}
        try:
            start_job(client, {**details, "runtime_env": runtime_env})
        except RuntimeError as error:
            # The same job was submitted by someone else after the check for existing attempts.
            if "already exists" not in str(error):
                raise
            return _existing(get_state(client, url, submission_id))
    return SubmittedJob(
        submission_id=submission_id,
        created=True,
        status="PENDING",
        message=(
            f"Submitted {submission_id} with {len(package.files)} files ({package.num_bytes / 1024**2:.1f} MiB) to"
            f" {url}."
        ),
    )


def _has_package(package: Package) -> bool:
    return any(Path(file.name).is_relative_to(PACKAGE_FOLDER) for file in package.files)


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


def _check_public(request: JobRequest, env_vars: Mapping[str, str]) -> None:
    """Rejects secrets in settings that anyone with permission to list jobs can read."""
    given = {"--set": list(request.overrides), "--env": dict(env_vars)}
    for where, reason in itertools.chain(secret_settings(given), secret_settings(request.settings)):
        raise UserError(
            f"{where} {reason}, and anyone with permission to list jobs could read it; remove it, and set secrets in"
            " the environment of the cluster's nodes."
        )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # In a container, the user may have no entry in /etc/passwd.
        return f"uid-{os.getuid()}"
