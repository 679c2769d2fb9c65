"""The report of `parcelray jobs show`: a job with its runs, checkpoints, model versions, endpoint and failures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group

    from parcelray.cluster.failures import FailedWorker
    from parcelray.cluster.jobs import JobState
    from parcelray.tracking.lineage import JobRun

_SHOWN_LINES = 30
"""Number of last lines of a traceback that are printed; the JSON has all."""


@dataclass(frozen=True)
class JobReport:
    """What is known about a job on a cluster."""

    state: "JobState"
    runs: Sequence["JobRun"]
    checkpoints: Sequence[str]
    """Training checkpoints of the run, oldest first."""
    endpoint: dict[str, str]
    """Status of each Serve application of a serve job, by its name."""
    failures: Sequence["FailedWorker"]
    notes: Sequence[str]
    """What could not be queried, one sentence each."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON-serialisable values."""
        return self.state.to_dict() | {
            "runs": [run._asdict() for run in self.runs],
            "checkpoints": list(self.checkpoints),
            "model_versions": [version for run in self.runs for version in run.versions],
            "endpoint": self.endpoint,
            "failures": [failure.to_dict() for failure in self.failures],
            "notes": list(self.notes),
        }

    def to_rich(self) -> "Group":
        """Returns the report for the console."""
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Table

        state, table = self.state, Table("job", self.state.submission_id, title_justify="left")
        rows = {
            "status": state.status + (f": {state.message}" if state.message else ""),
            "started": f"{state.started:%Y-%m-%d %H:%M:%S} UTC" if state.started else "",
            "duration": duration(state),
            "user": state.metadata.get("user", ""),
            "commit": state.metadata.get("git_commit", "")
            + (", with uncommitted changes" if state.metadata.get("git_dirty") == "true" else ""),
            "command": state.entrypoint,
            "driver": state.driver_node,
            "storage": state.metadata.get("storage", ""),
            "run": "\n".join(f"{run.name} {run.status}, attempt {run.attempt}, {run.run_id}" for run in self.runs),
            "model in": "\n".join(dict.fromkeys(run.model_in for run in self.runs if run.model_in)),
            "model out": "\n".join(dict.fromkeys(run.model_out for run in self.runs if run.model_out)),
            "model version": "\n".join(version for run in self.runs for version in run.versions),
            "checkpoints": "\n".join(self.checkpoints),
            "endpoint": "\n".join(f"{name}: {status}" for name, status in self.endpoint.items()),
        }
        for name, text in rows.items():
            if text:
                table.add_row(name, escape(text))
        failures = []
        for failure in self.failures:
            lines = failure.error.splitlines()[-_SHOWN_LINES:]
            process = f", process {failure.pid}" if failure.pid else ""
            where = f"{failure.name} on {failure.node or 'an unknown node'}{process}"
            failures.append(escape("\n".join([f"\nFailed: {where}", f"Log: {failure.log}", *lines])))
        return Group(table, *failures, *(f"Note: {escape(note)}" for note in self.notes))


def build_report(submission_id: str, *, address: str | None) -> JobReport:
    """Queries the cluster, the MLflow store and the storage of a job; what does not answer becomes a note.

    Args:
        submission_id: id of the job on the cluster.
        address: address of the cluster's dashboard.

    Raises:
        UserError: the cluster has no such job, is unreachable or rejects the token.
    """
    from parcelray.cluster import failures, jobs

    state = jobs.status(submission_id, address=address)
    notes: list[str] = []
    runs = _try(notes, "runs", lambda: _runs(state, address))
    checkpoints = _try(notes, "checkpoints", lambda: _checkpoints(state))
    endpoint = _try(notes, "endpoint", lambda: jobs.applications(address=address)) if _kind(state) == "serve" else {}
    failed: list[FailedWorker] = []
    if state.status == "FAILED":
        driver = _try(notes, "log", lambda: failures.failed_driver(state, address=address))
        failed = [driver] if driver is not None else []
        if state.ray_job_id:
            workers = _try(notes, "workers", lambda: failures.failed_workers(state.ray_job_id, address=address))
            failed = [*(workers or []), *failed]
    return JobReport(state, runs or [], checkpoints or [], endpoint or {}, failed, notes)


def duration(state: "JobState") -> str:
    """Time from the start of a job to its end, or until now, as `h:mm:ss`; empty if it has not started."""
    import datetime

    if state.started is None:
        return ""
    seconds = int(((state.ended or datetime.datetime.now(datetime.UTC)) - state.started).total_seconds())
    return str(datetime.timedelta(seconds=max(0, seconds)))


def _try(notes: list[str], what: str, query: Any) -> Any:
    """Calls a query; a failure becomes a note, because the rest of the report is still of use."""
    from parcelray.errors import ParcelrayError

    try:
        return query()
    except (ParcelrayError, OSError) as error:
        notes.append(f"The {what} of this job cannot be queried from here: {error}")
        return None


def _kind(state: "JobState") -> str:
    return state.metadata.get("identity", "").partition("-")[0]


def _runs(state: "JobState", address: str | None) -> list["JobRun"]:
    from parcelray.cluster import jobs
    from parcelray.tracking.lineage import runs_of_jobs
    from parcelray.tracking.store import ensure_store, explained_store_failures, single_attempts

    uri = state.metadata.get("tracking_uri", "")
    if not uri:
        return []
    # All attempts, because a run that a later attempt resumed has the id of that attempt.
    with explained_store_failures(uri), single_attempts(30):
        return runs_of_jobs(ensure_store(uri), jobs.attempt_ids(state.submission_id, address=address))


def _checkpoints(state: "JobState") -> list[str]:
    from parcelray.files import open_storage
    from parcelray.tracking.run_folder import CHECKPOINT

    identity, storage = state.metadata.get("identity", ""), state.metadata.get("storage", "")
    if _kind(state) != "train" or not storage:
        return []
    filesystem, root = open_storage(storage)
    name = identity.partition("-")[2].rpartition("-")[0]
    return sorted(str(each) for each in filesystem.glob(f"{root}/train/{name}/*/{CHECKPOINT}*"))
