"""`parcelray submit` and `parcelray jobs` without a cluster."""

import datetime
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from parcelray.cli.job_report import JobReport
from parcelray.cli.jobs import states_table
from parcelray.cluster import failures, jobs, submission
from parcelray.cluster.failures import FailedWorker
from parcelray.cluster.jobs import JobState
from parcelray.cluster.submission import JobRequest, SubmittedJob
from parcelray.serving.http.auth import add_key
from parcelray.tracking.lineage import JobRun

BASE = "jobs/train/mini_base.yaml"
SHARED = ("--set", "storage=s3://bucket/runs", "--set", "tracking.uri=http://mlflow:5000")
ADDRESS = ("--address", "http://127.0.0.1:1")
STATE = JobState(
    submission_id="train-nlvr_parcel_elastic_with_distillation-0a1b2c3d-r2",
    status="FAILED",
    message="Job entrypoint command failed with exit code 1, last available logs (truncated to 20,000 chars): ...",
    entrypoint="python -m parcelray.cli train jobs/train/nlvr.yaml",
    started=datetime.datetime(2026, 11, 29, 4, 30, 12, tzinfo=datetime.UTC),
    ended=datetime.datetime(2026, 11, 29, 17, 45, 13, tzinfo=datetime.UTC),
    metadata={"user": "ann", "git_commit": "c" * 40, "git_dirty": "true", "storage": "s3://bucket/runs"},
    driver_node="10.7.0.1",
    ray_job_id="02000000",
)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[JobRequest, dict[str, Any]]]:
    """Replaces the cluster; returns what was sent."""
    requests: list[tuple[JobRequest, dict[str, Any]]] = []

    def submit(request: JobRequest, **options: Any) -> SubmittedJob:
        requests.append((request, options))
        return SubmittedJob(request.submission_id, True, "PENDING", f"Submitted {request.submission_id}.")

    monkeypatch.setattr(submission, "submit", submit)
    return requests


def test_submit_sends_environment_variables_and_prints_json(run: Any, sent: list[Any]) -> None:
    found = run("submit", BASE, *SHARED, *ADDRESS, "--env", "OMP_NUM_THREADS=4", "--env", "A=b=c", "--json")
    assert found.code == 0
    assert json.loads(found.out)["status"] == "PENDING"
    (request, options) = sent[0]
    assert options["env_vars"] == {"OMP_NUM_THREADS": "4", "A": "b=c"}
    assert (request.storage, request.tracking_uri) == ("s3://bucket/runs", "http://mlflow:5000")
    for wrong in ("OMP_NUM_THREADS", "=4", "a b=1"):
        assert "give NAME=VALUE" in run("submit", BASE, *SHARED, *ADDRESS, "--env", wrong).err


def test_the_keys_of_an_endpoint_are_sent_with_its_job(run: Any, sent: list[Any], tmp_path: Path) -> None:
    job = ("submit", "jobs/serve/mini.yaml", "--set", "tracking.uri=null", "--set", "http.host=0.0.0.0", *ADDRESS)
    keys = Path(os.path.relpath(tmp_path / "keys.txt"))
    missing = run(*job, "--set", f"http.keys_file={keys}")
    assert (missing.code, sent) == (2, [])
    assert "create it with `parcelray keys add NAME" in missing.err
    add_key(keys, "ann")
    assert run(*job, "--set", f"http.keys_file={keys}").code == 0
    assert run(*job, "--set", f"http.keys_file={tmp_path}/on_the_head.txt").code == 0
    assert [[file.resolve() for file in request.further] for request, _ in sent] == [[keys.resolve()], []]


def test_results_at_relative_paths_would_be_lost(run: Any, sent: list[Any]) -> None:
    found = run("submit", BASE, *ADDRESS)
    assert found.code == 2
    assert "storage (runs) and tracking.uri (sqlite:///runs/mlflow.db): relative paths are inside" in found.err
    assert sent == []
    assert run("submit", BASE, *ADDRESS, "--set", "storage=/shared/runs", "--set", "tracking.uri=null").code == 0


def test_a_search_is_confirmed_and_a_pipeline_is_submitted(run: Any, sent: list[Any]) -> None:
    assert run("submit", "jobs/tune/anchor_query_split.yaml", *SHARED, *ADDRESS, "--confirm").code == 0
    assert sent[0][0].submission_id.endswith("-confirm")
    assert "--confirm belongs to a search" in run("submit", BASE, *SHARED, *ADDRESS, "--confirm").err
    for extra in ((), ("--confirm",), ("--set", "splits.seed=1")):
        assert run("submit", "pipelines/search.py", *SHARED, *ADDRESS, *extra).code == 0
    requests = [request for request, _ in sent[1:]]
    assert len({request.submission_id for request in requests}) == 3
    assert requests[0].storage == "s3://bucket/runs"
    assert run("submit", "pipelines/nothing.py", *ADDRESS).code == 2


def test_ctrl_c_leaves_the_job_running_and_says_so(run: Any, sent: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Iterator[str]:
        yield "step 1\n"
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "logs", interrupted)
    monkeypatch.setattr(jobs, "stop", lambda *_, **__: pytest.fail("the job must not be stopped"))
    found = run("submit", BASE, *SHARED, *ADDRESS, "--wait")
    assert found.code == 130
    assert found.out.endswith("step 1\n")
    assert f"The job {sent[0][0].identity} continues on the cluster" in found.err
    found = run("jobs", "logs", "train-a-00000000", "--follow", *ADDRESS)
    assert (found.code, found.out) == (130, "step 1\n")


def test_waiting_prints_the_logs_and_ends_with_the_state(
    run: Any, sent: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(submission_id: str, *, address: str, write: Any) -> JobState:
        write("step 1\n")
        return STATE

    monkeypatch.setattr(jobs, "wait", wait)
    found = run("submit", BASE, *SHARED, *ADDRESS, "--wait", "--json")
    assert found.code == 1
    assert json.loads(found.out)["ended"] == "2026-11-29T17:45:13+00:00"
    assert "step 1" in found.err
    assert "`parcelray jobs show" in run("submit", BASE, *SHARED, *ADDRESS, "--wait").err


def test_the_output_of_a_job_reaches_a_log_file_at_once(
    run: Any, sent: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log, seen = tmp_path / "log", []

    def wait(submission_id: str, *, address: str, write: Any) -> JobState:
        write("step 1\n")
        seen.append(log.read_text())
        return STATE

    monkeypatch.setattr(jobs, "wait", wait)
    with log.open("w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        run("submit", BASE, *SHARED, *ADDRESS, "--wait")
    assert seen[0].endswith("step 1\n")


def test_the_list_is_readable_at_100_columns(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(states_table([STATE]))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 100
    text = "".join(lines)
    for shown in ("FAILED", "11-29 04:30", "13:15:01", "Job entrypoint"):
        assert shown in text
    monkeypatch.setattr(jobs, "list_jobs", lambda address: [STATE])
    (listed,) = json.loads(run("jobs", "list", *ADDRESS, "--json").out)
    assert listed["submission_id"] == STATE.submission_id
    assert listed["metadata"]["user"] == "ann"


def test_show_has_the_runs_the_failure_and_what_could_not_be_queried(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run_of_job = JobRun("train-nlvr-0a1b2c3d", "f" * 32, "FAILED", 2, "models:/a/1", "sha256:12", ("models:/a/2",))
    failure = FailedWorker("train_worker", "10.7.0.11", 4711, "Traceback\nValueError: [bold]", "/logs/worker-1.err")
    report = JobReport(STATE, [run_of_job], ["bucket/runs/checkpoint_1"], {}, [failure], ["MLflow is away."])
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(report.to_rich())
    text = console.export_text()
    for shown in ("10.7.0.11", "4711", "ValueError: [bold]", "/logs/worker-1.err", "models:/a/2", "MLflow is away."):
        assert shown in text
    assert report.to_dict()["model_versions"] == ["models:/a/2"]

    monkeypatch.setattr(jobs, "status", lambda submission_id, address: STATE)
    monkeypatch.setattr(failures, "failed_workers", lambda ray_job_id, address: [failure])
    monkeypatch.setattr(failures, "logs", lambda submission_id, address: iter(["step 1\n", "failed: no disk\n"]))
    monkeypatch.setattr(failures, "get_json", lambda url, path, token: {"session_name": "session_1"})
    shown = json.loads(run("jobs", "show", STATE.submission_id, *ADDRESS, "--json").out)
    assert [each["name"] for each in shown["failures"]] == ["train_worker", "driver"]
    assert shown["failures"][1]["error"] == "step 1\nfailed: no disk"
    assert f"session_1/logs/job-driver-{STATE.submission_id}.log" in shown["failures"][1]["log"]
    assert shown["checkpoints"] == []


def test_the_checkpoints_of_a_job_are_listed(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "train" / "nlvr" / "in-process" / "checkpoint_00000004").mkdir(parents=True)
    metadata = {"identity": "train-nlvr-0a1b2c3d", "storage": str(tmp_path)}
    state = JobState(**(vars(STATE) | {"status": "SUCCEEDED", "metadata": metadata}))
    monkeypatch.setattr(jobs, "status", lambda submission_id, address: state)
    shown = json.loads(run("jobs", "show", state.submission_id, *ADDRESS, "--json").out)
    assert [Path(each).name for each in shown["checkpoints"]] == ["checkpoint_00000004"]
