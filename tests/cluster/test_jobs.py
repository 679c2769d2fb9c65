"""Ray Jobs on a real `ray start --head` with token authentication on loopback; one cluster for the module."""

import os
import platform
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

import parcelray
from parcelray.cluster import jobs, preflight
from parcelray.cluster.failures import failed_driver, failed_workers
from parcelray.cluster.submission import JobRequest, submit
from parcelray.cluster.versions import query_versions
from parcelray.config import loader
from parcelray.config.identity import identity
from parcelray.config.train import TrainJob
from parcelray.errors import UserError
from parcelray.models.vlm import load_vlm
from parcelray.tracking.run_folder import RunFolder

from ..processes import LIMIT_S, end_session, wait_until
from ..training.conftest import TINY

# Ray 2.60's client opens its log stream in a way that aiohttp 3.14 calls deprecated.
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning")]

# Replaces the real command: the job file selects the behaviour. `work` joins the cluster as every real job does.
STAND_IN = """
import os, sys, time
from pathlib import Path

kind, job_file, *settings = sys.argv[1:]
behaviour = Path(job_file).read_text().split()[-1]
print("begin", kind, job_file, *settings)
print("greeting", os.environ.get("GREETING"))
if behaviour == "sleep":
    time.sleep(3600)

import ray
from parcelray.cluster.session import ray_session

@ray.remote(num_cpus=1)
def where():
    import parcelray.errors
    return parcelray.errors.__file__

@ray.remote(num_cpus=1, max_retries=0)
def broken():
    raise ValueError("a sample without an image")

with ray_session() as session:
    if behaviour == "break":
        ray.get(broken.remote())
    print("worker imports", ray.get(where.remote()))
    print("cpus", session.resources["CPU"])
"""


# A driver that is started manually on a machine with access to the cluster.
DRIVER = """
import ray
from parcelray.cluster.session import ray_session

@ray.remote(num_cpus=1)
def where():
    import parcelray.errors
    return parcelray.errors.__file__

with ray_session() as session:
    print(session.owned, session.resources["CPU"], ray.get(where.remote()))
"""


class Cluster(NamedTuple):
    address: str
    """URL of the dashboard."""
    gcs: str
    token: str


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    token = secrets.token_hex(32)
    gcs, dashboard, agent, agent_grpc, environment_agent, metrics, ray_client = free_ports(7)
    # pytest's own temporary folders are too long for Ray's socket names.
    with tempfile.TemporaryDirectory(prefix="pr", ignore_cleanup_errors=True) as folder:
        variables = {
            name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH"))
        } | {
            "HOME": folder,
            "RAY_TMPDIR": folder,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        command = [
            *(
                sys.executable,
                "-m",
                "ray.scripts.scripts",
                "start",
                "--head",
                "--block",
                "--num-cpus=2",
                "--disable-usage-stats",
            ),
            *(
                "--node-ip-address=127.0.0.1",
                "--dashboard-host=127.0.0.1",
                f"--port={gcs}",
                f"--dashboard-port={dashboard}",
            ),
            *(
                f"--dashboard-agent-listen-port={agent}",
                f"--dashboard-agent-grpc-port={agent_grpc}",
                f"--runtime-env-agent-port={environment_agent}",
            ),
            *(
                f"--metrics-export-port={metrics}",
                f"--ray-client-server-port={ray_client}",
                "--object-store-memory=100000000",
            ),
        ]
        log = Path(folder) / "start.log"
        with log.open("wb") as output:
            head = subprocess.Popen(
                command, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            url = f"http://127.0.0.1:{dashboard}"
            try:
                wait_until(lambda: is_up(url, token), "the dashboard answers", head)
            except AssertionError as error:
                pytest.fail(f"The cluster did not start. {error} {log.read_text()[-2000:]}")
            yield Cluster(url, f"127.0.0.1:{gcs}", token)
        finally:
            # A regular stop would wait half a minute for the actors that Ray Data leaves behind.
            end_session(head.pid)
            head.wait(timeout=LIMIT_S)


def is_up(url: str, token: str) -> bool:
    try:
        preflight.cluster_version(url, token)
    except UserError:
        return False
    return True


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    source = Path(parcelray.__file__).parent
    package = root / "platform" / "parcelray"
    package.mkdir(parents=True)
    for name in ("__init__.py", "environment.py", "errors.py"):
        shutil.copy(source / name, package / name)
    shutil.copytree(source / "cluster", package / "cluster", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "cli.py").write_text(STAND_IN)
    (root / "jobs").mkdir()
    for behaviour in ("work", "sleep", "break"):
        (root / "jobs" / f"{behaviour}.yaml").write_text(f"behaviour: {behaviour}\n")
    for arguments in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True)
    return root


@pytest.fixture(autouse=True)
def environment(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", cluster.token)
    # The dashboard of a busy machine responds slowly.
    monkeypatch.setattr(preflight, "TIMEOUT_S", LIMIT_S)
    # In Ray's own client, this variable would override the given address.
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")


def wait_for_status(submission_id: str, status: str, address: str) -> None:
    wait_until(
        lambda: jobs.status(submission_id, address=address).status == status, f"the job {submission_id} is {status}"
    )


def test_a_job_runs_with_the_package_of_the_project_and_is_submitted_only_once(
    cluster: Cluster, project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    identity = "train-work-0000000a"
    request = JobRequest(project / "jobs" / "work.yaml", identity, ["training.note=two words"])
    send = partial(submit, request, address=cluster.address, env_vars={"GREETING": "hello"})
    sent = send()
    assert sent.created
    assert sent.submission_id == identity

    pieces: list[str] = []
    state = jobs.wait(identity, address=cluster.address, write=pieces.append)
    output = "".join(pieces)
    assert state.exit_code == 0, output
    assert "begin train jobs/work.yaml --set training.note=two words" in output
    assert "cpus 2.0" in output
    assert "greeting hello" in output
    assert "job_manager.py" not in output, "Ray's own log lines are left out"
    (imported,) = [line for line in output.splitlines() if line.startswith("worker imports")]
    assert "py_modules_files" in imported
    assert "".join(jobs.logs(identity, address=cluster.address)) == output

    assert state.metadata["config_hash"] == "0000000a"
    assert state.metadata["git_commit"] == "none"
    assert state.metadata["job_file"] == "jobs/work.yaml"
    assert cluster.token not in str(state) + output

    assert capfd.readouterr() == ("", ""), "Ray's own log lines stay off the terminal"
    second = send()
    assert (second.created, second.submission_id, second.status) == (False, identity, "SUCCEEDED")
    assert "already exists with status SUCCEEDED" in second.message


@pytest.mark.nightly
def test_a_training_runs_as_a_job(cluster: Cluster, tmp_path: Path) -> None:
    root = tmp_path / "project"
    shutil.copytree(
        Path(parcelray.__file__).parent, root / "platform" / "parcelray", ignore=shutil.ignore_patterns("__pycache__")
    )
    (root / "jobs").mkdir()
    path = root / "jobs" / "tiny.yaml"
    job = TINY | {
        "storage": str(tmp_path / "runs"),
        "scaling": {"num_workers": 1},
        "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"},
    }
    path.write_text(yaml.safe_dump(job), encoding="utf-8")
    for arguments in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True)
    name = identity(loader.load_job(path))

    assert submit(JobRequest(path, name), address=cluster.address).created
    pieces: list[str] = []
    state = jobs.wait(name, address=cluster.address, write=pieces.append)
    assert state.status == "SUCCEEDED", "".join(pieces)
    folder = RunFolder(loader.load_job_of(TrainJob, path))
    result = folder.result()
    assert result is not None
    assert result["metrics"]["val/score@16"] >= 0
    assert load_vlm(folder.local_path(result["model"])).connector.name == "parcel"
    assert not submit(JobRequest(path, name), address=cluster.address).created


def test_a_running_job_is_listed_is_not_duplicated_and_can_be_stopped(cluster: Cluster, project: Path) -> None:
    identity, job_file = "tune-sleep-0000000b", project / "jobs" / "sleep.yaml"
    request = JobRequest(job_file, identity)
    submit(request, address=cluster.address)
    wait_for_status(identity, "RUNNING", cluster.address)
    assert (identity, "RUNNING") in [
        (state.submission_id, state.status) for state in jobs.list_jobs(address=cluster.address)
    ]
    assert not submit(request, address=cluster.address, again=True).created

    stopped = jobs.stop(identity, address=cluster.address, timeout_s=LIMIT_S)
    assert (stopped.status, stopped.exit_code) == ("STOPPED", 1)
    assert jobs.stop(identity, address=cluster.address).status == "STOPPED"


def test_a_failed_job_exits_with_1_its_reasons_are_found_and_its_next_attempt_gets_a_number(
    cluster: Cluster, project: Path
) -> None:
    identity = "evaluate-break-0000000c"
    request = JobRequest(project / "jobs" / "break.yaml", identity)
    submit(request, address=cluster.address)
    pieces: list[str] = []
    state = jobs.wait(identity, address=cluster.address, write=pieces.append)
    assert (state.status, state.exit_code) == ("FAILED", 1)
    assert "ValueError: a sample without an image" in "".join(pieces)
    assert state.message == "exit code 1: ValueError: a sample without an image"
    assert state.ray_job_id

    def find() -> bool:
        # Ray's workers send their events once a second.
        return bool(failed_workers(state.ray_job_id, address=cluster.address))

    wait_until(find, "the dashboard knows the failed task")
    (failure,) = failed_workers(state.ray_job_id, address=cluster.address)
    assert failure.name.endswith("broken")
    assert failure.node
    assert failure.pid > 0
    assert "ValueError: a sample without an image" in failure.error
    assert "Traceback" in failure.error or "line " in failure.error
    assert f"{failure.pid}.err" in failure.log, failure
    driver = failed_driver(state, address=cluster.address)
    assert "ValueError: a sample without an image" in driver.error
    assert f"logs/job-driver-{identity}.log" in driver.log

    retry = submit(request, address=cluster.address, entrypoint="echo fixed")
    assert (retry.created, retry.submission_id) == (True, f"{identity}-r2")
    assert jobs.wait(retry.submission_id, address=cluster.address, write=pieces.append).exit_code == 0
    assert not submit(request, address=cluster.address).created
    assert jobs.attempt_ids(retry.submission_id, address=cluster.address) == [identity, f"{identity}-r2"]


def test_the_versions_of_a_cluster_can_be_queried(cluster: Cluster) -> None:
    client = jobs.open_client(cluster.address, cluster.token)
    found = query_versions(client)
    assert found.python == platform.python_version()
    assert found.libraries["ray"] == preflight.local_ray_version()
    assert not [each for each in jobs.list_jobs(address=cluster.address) if each.submission_id.startswith("versions-")]


class _StartingCluster:
    """A client whose cluster has no agent for its first attempts, as one that has just started."""

    def __init__(
        self, failures: int, message: str = "500: No available agent to submit job, please try again later"
    ) -> None:
        self.failures, self.message, self.attempts = failures, message, 0

    def submit_job(self, **request: object) -> None:
        self.attempts += 1
        if self.attempts <= self.failures:
            raise RuntimeError(self.message)


def test_a_cluster_that_has_just_started_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("parcelray.cluster.jobs.time.sleep", pauses.append)
    starting = _StartingCluster(failures=3)
    jobs.start_job(starting, {})  # type: ignore[arg-type]
    assert (starting.attempts, len(pauses)) == (4, 3)
    never = _StartingCluster(failures=10**6)
    with pytest.raises(RuntimeError, match="No available agent"):
        jobs.start_job(never, {})  # type: ignore[arg-type]
    assert never.attempts == jobs._AGENT_ATTEMPTS
    broken = _StartingCluster(failures=1, message="the entrypoint is illegal")
    with pytest.raises(RuntimeError, match="illegal"):
        jobs.start_job(broken, {})  # type: ignore[arg-type]


def test_a_missing_or_wrong_token_is_reported(cluster: Cluster, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    with pytest.raises(UserError, match=r"requires a token \(401\) and none was found; set RAY_AUTH_TOKEN"):
        submit(JobRequest(project / "jobs" / "work.yaml", "train-work-0000000d"), address=cluster.address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(UserError, match=r"does not accept this token \(403\)"):
        jobs.list_jobs(address=cluster.address)


def test_another_version_of_ray_prevents_submitting_but_not_listing(
    cluster: Cluster, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = preflight.local_ray_version()
    monkeypatch.setattr(preflight, "local_ray_version", lambda: "2.0.1")
    with pytest.raises(UserError, match=rf"The cluster runs Ray {here} and this machine Ray 2\.0\.1"):
        submit(JobRequest(project / "jobs" / "work.yaml", "train-work-0000000d"), address=cluster.address)
    jobs.list_jobs(address=cluster.address)


def test_an_unknown_job_is_reported(cluster: Cluster) -> None:
    for query in (jobs.status, jobs.stop):
        with pytest.raises(UserError, match="There is no job train-none-0000000e"):
            query("train-none-0000000e", address=cluster.address)
    with pytest.raises(UserError, match="There is no job"):
        list(jobs.logs("train-none-0000000e", address=cluster.address, follow=True))


def test_a_driver_outside_of_a_job_joins_and_sends_the_package(cluster: Cluster) -> None:
    variables = os.environ | {
        "RAY_ADDRESS": cluster.gcs,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(parcelray.__file__).parents[1]),
    }
    driver = subprocess.run(
        [sys.executable, "-c", DRIVER], env=variables, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert driver.stdout.startswith("True 2.0 "), driver.stdout + driver.stderr
    assert "py_modules_files" in driver.stdout
