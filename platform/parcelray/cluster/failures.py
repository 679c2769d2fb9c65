"""Failed workers of a job: from the state that Ray's dashboard keeps of tasks and actors, and from the job's log.

The dashboard does not know the failures of training workers, because Ray Train returns them as values. The driver of a
submitted job therefore logs their tracebacks.
"""

import re
import urllib.parse
from dataclasses import asdict, dataclass
from typing import Any

from parcelray.cluster.auth import find_token
from parcelray.cluster.jobs import JobState, logs
from parcelray.cluster.preflight import dashboard_url, get_json

_PROCESS = re.compile(r"\(pid=(?P<pid>\d+), ip=(?P<ip>[\d.]+)")
"""Process in the first line of a traceback: `ray::train() (pid=4711, ip=10.7.0.11)`."""
_LIMIT = 20
"""Largest number of failed workers."""
_LAST_LINES = 50
"""Number of last lines of the log of a job that are taken for the reason of its failure."""


@dataclass(frozen=True)
class FailedWorker:
    """A task, an actor or the driver of a job that failed."""

    name: str
    """Name of the task or of the actor's class; `driver` for the driver."""
    node: str
    """IP address of its node."""
    pid: int
    """Process id on the node; 0 if it is unknown."""
    error: str
    """Traceback of the task, the reason why the process ended, or the last lines of the driver's log."""
    log: str
    """Path of the worker's log on the node; `*` stands for the worker's id."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the failure as a JSON-serialisable dictionary."""
        return asdict(self)


def failed_driver(state: JobState, *, address: str | None) -> FailedWorker:
    """Reads the last lines of the log of a failed job, with the tracebacks of its training workers.

    Args:
        state: the job.
        address: address of the cluster's dashboard.

    Raises:
        UserError: the cluster is unreachable or rejects the token.
        SystemFailure: the cluster failed on the request.
    """
    lines = "".join(logs(state.submission_id, address=address)).splitlines()
    folder = f"ray/{_session(address)}/logs"
    log = f"{folder}/job-driver-{state.submission_id}.log in Ray's temporary folder"
    if state.metadata.get("identity", "").startswith(("train-", "tune-")):
        log += f"; of training workers {folder}/train/ray-train-app-worker-*.log on their nodes"
    return FailedWorker("driver", state.driver_node, 0, "\n".join(lines[-_LAST_LINES:]), log)


def failed_workers(ray_job_id: str, *, address: str | None) -> list[FailedWorker]:
    """Queries the failed workers of a job, tasks with a traceback first.

    Args:
        ray_job_id: Ray's id of the driver, see `jobs.JobState`.
        address: address of the cluster's dashboard.

    Raises:
        UserError: the cluster is unreachable or rejects the token.
        SystemFailure: the cluster failed on the request.
    """
    url, token = dashboard_url(address), find_token()

    def rows(kind: str, **filters: str) -> list[dict[str, Any]]:
        keys = [("detail", "1"), ("limit", str(_LIMIT))]
        for key, value in filters.items():
            keys += [("filter_keys", key), ("filter_predicates", "="), ("filter_values", value)]
        answer = get_json(url, f"/api/v0/{kind}?{urllib.parse.urlencode(keys)}", token)
        found: list[dict[str, Any]] = answer["data"]["result"]["result"]
        return found

    nodes = {node["node_id"]: node["node_ip"] for node in rows("nodes")}
    session = _session(address)

    def failure(row: dict[str, Any], name: str, pid: int, error: str) -> FailedWorker:
        # The dashboard gets the error before the process of the task.
        named = _PROCESS.search(error)
        pid = pid or (int(named["pid"]) if named else 0)
        node = nodes.get(row["node_id"]) or (named["ip"] if named else "")
        stored = (row.get("task_log_info") or {}).get("stderr_file")
        log = stored or f"ray/{session}/logs/worker-*-{ray_job_id}-{pid}.err in Ray's temporary folder"
        return FailedWorker(name, node, pid, error, log)

    tasks = [
        failure(row, row["name"], row.get("worker_pid") or 0, str(row.get("error_message") or row.get("error_type")))
        for row in rows("tasks", job_id=ray_job_id, state="FAILED")
    ]
    actors = [
        failure(row, row["class_name"], row.get("pid") or 0, reason)
        for row in rows("actors", job_id=ray_job_id, state="DEAD")
        if (reason := _reason(row.get("death_cause") or {}))
    ]
    known = {(each.node, each.pid) for each in tasks}
    return tasks + [each for each in actors if (each.node, each.pid) not in known]


def _session(address: str | None) -> str:
    """Name of the folder of Ray's current session, below `ray/` in the temporary folder of each node."""
    return str(get_json(dashboard_url(address), "/api/version", find_token())["session_name"])


def _reason(death_cause: dict[str, Any]) -> str:
    """Why an actor died; empty if it was ended on purpose or with its job."""
    context = death_cause.get("actor_died_error_context") or {}
    if context.get("reason") in ("RAY_KILL", "OUT_OF_SCOPE", "REF_DELETED", "OWNER_DIED"):
        return ""
    failure = (death_cause.get("creation_task_failure_context") or {}).get("formatted_exception_string")
    return str(failure or context.get("error_message") or "").strip()
