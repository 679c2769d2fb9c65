"""Failed workers of a job, from the state that Ray's dashboard keeps of tasks and actors."""

import re
import urllib.parse
from dataclasses import asdict, dataclass
from typing import Any

from parcelray.cluster.auth import find_token
from parcelray.cluster.preflight import dashboard_url, get_json

_PROCESS = re.compile(r"\(pid=(?P<pid>\d+), ip=(?P<ip>[\d.]+)")
"""Process in the first line of a traceback: `ray::train() (pid=4711, ip=10.7.0.11)`."""
_LIMIT = 20
"""Largest number of failed workers."""


@dataclass(frozen=True)
class FailedWorker:
    """A task or an actor of a job that failed."""

    name: str
    """Name of the task or of the actor's class."""
    node: str
    """IP address of its node."""
    pid: int
    """Process id on the node; 0 if the process has never started."""
    error: str
    """Traceback of the task, or the reason why the process ended."""
    log: str
    """Path of the worker's log on the node; `*` stands for the worker's id."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the failure as a JSON-serialisable dictionary."""
        return asdict(self)


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
    session = get_json(url, "/api/version", token)["session_name"]

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


def _reason(death_cause: dict[str, Any]) -> str:
    """Why an actor died; empty if it was ended on purpose or with its job."""
    context = death_cause.get("actor_died_error_context") or {}
    if context.get("reason") in ("RAY_KILL", "OUT_OF_SCOPE", "REF_DELETED", "OWNER_DIED"):
        return ""
    failure = (death_cause.get("creation_task_failure_context") or {}).get("formatted_exception_string")
    return str(failure or context.get("error_message") or "").strip()
