"""Lineage of a run as tags of its MLflow run: submitted job, cluster, code, data, model in and out.

The driver of a submitted job has no git checkout, so the commit comes with the job.
"""

import json
import os
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

JOB_TAG = "parcel.job"
"""Id of the submitted job on its cluster."""
CLUSTER_TAG = "parcel.cluster"
"""Address of the cluster's head, HOST:PORT of its GCS."""
COMMIT_TAG = "mlflow.source.git.commit"
SOURCE_TAG = "mlflow.source.name"
USER_TAG = "mlflow.user"
DATA_TAG = "parcel.data"
"""Fingerprint of the data of a run."""
MODEL_IN_TAG = "parcel.model_in"
"""Pinned reference of the model that a run starts from or evaluates; `scratch` for none."""
MODEL_OUT_TAG = "parcel.model_out"
"""`models:/NAME/VERSION` of the model that a run made, or `sha256:DIGEST` of its files if it is not registered."""
_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable in which Ray tells the driver of a submitted job about the job."""


def submitted_job() -> Mapping[str, str]:
    """Metadata of the submitted job that this process drives, as `cluster.submission` wrote them; empty elsewhere."""
    metadata: Mapping[str, str] = json.loads(os.environ.get(_VARIABLE, "{}")).get("metadata") or {}
    return metadata


def user() -> str:
    """Name of the user who submitted the job, else of the user of this process."""
    return submitted_job().get("user") or os.environ.get("USER", "unknown")


def git_commit() -> str | None:
    """The commit of the running code, with the suffix `-dirty` if files differ from it; None if it is unknown."""
    job = submitted_job()
    if "git_commit" in job:
        dirty = "-dirty" if job.get("git_dirty") == "true" else ""
        return None if job["git_commit"] == "none" else job["git_commit"] + dirty
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def lineage_tags() -> dict[str, str]:
    """Tags of the code and of the submitted job that this process drives."""
    job = submitted_job()
    tags = {
        COMMIT_TAG: git_commit(),
        JOB_TAG: job.get("job_submission_id"),
        SOURCE_TAG: job.get("job_file"),
        CLUSTER_TAG: os.environ.get("RAY_ADDRESS") if job else None,
    }
    return {key: value for key, value in tags.items() if value}


class JobRun(NamedTuple):
    """One MLflow run of a submitted job."""

    name: str
    run_id: str
    status: str
    """RUNNING, FINISHED, FAILED or KILLED."""
    attempt: int
    model_in: str
    """Empty if it is unknown."""
    model_out: str
    """Empty if the run made no model."""
    versions: tuple[str, ...]
    """Versions of registered models that the run made, as `models:/NAME/VERSION`."""


def runs_of_jobs(tracking_uri: str, submission_ids: Iterable[str]) -> list[JobRun]:
    """Finds the MLflow runs that submitted jobs started or resumed, the newest first; children of runs are left out.

    Args:
        tracking_uri: tracking URI of the jobs.
        submission_ids: ids of the jobs, for example all attempts of one job.
    """
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=tracking_uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = []
    for submission_id in submission_ids:
        runs = client.search_runs(experiments, f"tags.`{JOB_TAG}` = '{submission_id}'", max_results=100)
        found += [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    return [
        JobRun(
            name=str(run.info.run_name),
            run_id=str(run.info.run_id),
            status=str(run.info.status),
            attempt=int(run.data.tags.get("parcel.attempt", "1")),
            model_in=run.data.tags.get(MODEL_IN_TAG, ""),
            model_out=run.data.tags.get(MODEL_OUT_TAG, ""),
            versions=tuple(
                f"models:/{each.name}/{each.version}"
                for each in client.search_model_versions(f"run_id='{run.info.run_id}'")
            ),
        )
        for run in sorted(found, key=lambda run: -run.info.start_time)
    ]
