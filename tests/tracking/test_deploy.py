"""The MLflow server of deploy/mlflow: its command, accounts, allowed hosts, and credentials of the object store."""

import base64
import configparser
import json
import os
import re
import secrets
import shlex
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from parcelray.errors import UserError
from parcelray.tracking.mlflow_tracker import MlflowRunLogger, tracked_run

from ..processes import LIMIT_S, wait_until

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "mlflow"
SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_FLASK_SERVER_SECRET_KEY", "MLFLOW_AUTH_ADMIN_PASSWORD")
BUCKET = "artifacts"


class Deployment(NamedTuple):
    command: list[str]
    environment: dict[str, str]


def of_compose() -> Deployment:
    service = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]["mlflow"]
    assert service["env_file"] == "mlflow.env"
    return Deployment(service["command"], service["environment"])


def of_systemd() -> Deployment:
    # systemd repeats keys, which `configparser` does not accept.
    lines = [line.partition("=") for line in (FOLDER / "mlflow.service").read_text().splitlines() if line[:1] != "#"]
    (command,) = [value for key, _, value in lines if key == "ExecStart"]
    assert [value for key, _, value in lines if key == "EnvironmentFile"] == ["/etc/mlflow/mlflow.env"]
    environment = dict(value.split("=", 1) for key, _, value in lines if key == "Environment")
    program, *arguments = shlex.split(command)
    return Deployment([Path(program).name, *arguments], environment)


def variables_of_example() -> dict[str, str]:
    lines = (FOLDER / "mlflow.env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def test_both_ways_run_the_same_server() -> None:
    compose, systemd = of_compose(), of_systemd()
    assert compose.command == systemd.command == shlex.split("mlflow server --app-name basic-auth --workers 1")
    assert compose.environment | {"MLFLOW_HOST": "127.0.0.1"} == systemd.environment


def test_secrets_come_from_files_that_git_does_not_track() -> None:
    example = variables_of_example()
    assert [name for name in SECRETS if example[name]] == []
    for name in ("compose.yaml", "mlflow.service", "basic_auth.ini"):
        settings = [line for line in (FOLDER / name).read_text().splitlines() if not line.lstrip().startswith("#")]
        assert [
            line for line in settings if re.search(r"(?i)(password|secret_key|access_key)\w*\s*[:=]\s*\S", line)
        ] == [line for line in settings if "postgres_password" in line and ":" in line and "[" not in line], name
    for name in ("mlflow.env", "postgres_password"):
        ignored = subprocess.run(["git", "check-ignore", "-q", str(FOLDER / name)], cwd=FOLDER, check=False)
        assert ignored.returncode == 0, name


def test_the_versions_are_those_of_the_lock(repo_root: Path) -> None:
    lock = dict(re.findall(r"^([\w.-]+)==(\S+)$", (repo_root / "requirements.lock").read_text(), flags=re.MULTILINE))
    for name in ("compose.yaml", "mlflow.service"):
        pins = re.findall(r"([\w-]+)(?:\[\w+\])?==([\w.]+)", (FOLDER / name).read_text())
        assert "mlflow" in dict(pins)
        assert [(name, version) for name, version in pins if lock[name] != version] == []


class Server(NamedTuple):
    url: str
    password: str
    objects: str
    """URL of the object store."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


@pytest.fixture(scope="module", params=[of_compose, of_systemd])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    deployment: Deployment = request.param()
    folder = tmp_path_factory.mktemp("mlflow")
    port, store_port, password = free_port(), free_port(), secrets.token_hex(12)
    keys = {"AWS_ACCESS_KEY_ID": "server", "AWS_SECRET_ACCESS_KEY": secrets.token_hex(12)}
    values = {
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{folder}/runs.db",
        "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{BUCKET}/mlflow",
        "MLFLOW_SERVER_ALLOWED_HOSTS": f"127.0.0.1:{port}",
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": f"http://127.0.0.1:{port}",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
        "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
    } | keys
    assert values.keys() == variables_of_example().keys()
    here = {
        "MLFLOW_HOST": "127.0.0.1",
        "MLFLOW_PORT": str(port),
        "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{store_port}",
    }
    here["MLFLOW_AUTH_CONFIG_PATH"] = str(FOLDER / "basic_auth.ini")
    environment = {**os.environ, **deployment.environment, **values, **here}
    program = Path(sys.executable).parent / deployment.command[0]
    processes = []
    with (folder / "log").open("wb") as log:
        for command in (
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(store_port)],
            [str(program), *deployment.command[1:]],
        ):
            processes.append(
                subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
        try:
            objects = here["MLFLOW_S3_ENDPOINT_URL"]
            wait_until(lambda: answers(objects), "the object store answers", processes[0])
            urllib.request.urlopen(urllib.request.Request(f"{objects}/{BUCKET}", method="PUT"), timeout=LIMIT_S).close()
            wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"), "the MLflow server answers", processes[1])
            yield Server(f"http://127.0.0.1:{port}", password, objects)
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(LIMIT_S)


def status_of(url: str, host: str | None = None) -> int:
    request = urllib.request.Request(url, headers={"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=LIMIT_S) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def create_user(server: Server, name: str, password: str) -> None:
    """Creates an account as the administrator does, with one HTTP request."""
    admin = base64.b64encode(f"admin:{server.password}".encode()).decode()
    request = urllib.request.Request(
        f"{server.url}/api/2.0/mlflow/users/create",
        data=json.dumps({"username": name, "password": password}).encode(),
        headers={"Authorization": f"Basic {admin}", "Content-Type": "application/json"},
    )
    urllib.request.urlopen(request, timeout=LIMIT_S).close()


@pytest.mark.nightly
@pytest.mark.serving
def test_the_server_has_accounts_and_keeps_the_credentials_of_the_object_store(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    search = f"{server.url}/api/2.0/mlflow/experiments/search?max_results=1"
    assert status_of(search) == 401
    assert status_of(search, host="evil.example") == 403
    with (
        pytest.raises(UserError, match=r"rejects this user \(401\); set MLFLOW_TRACKING_USERNAME"),
        tracked_run(server.url, "jobs", "train-a-00000000", params={}),
    ):
        pass

    def log_in(user: str, password: str) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)

    passwords = {user: secrets.token_hex(12) for user in ("cluster", "reader")}
    for user, password in passwords.items():
        create_user(server, user, password)

    log_in("cluster", passwords["cluster"])
    (tmp_path / "report.md").write_text("# Report")
    with tracked_run(server.url, "jobs", "train-a-00000000", params={"lr": 0.1}) as run_id:
        logger = MlflowRunLogger(server.url, run_id)
        logger.log_metrics({"train/loss": 0.5}, 1)
        logger.log_artifact(tmp_path / "report.md")
        logger.close()
    client = MlflowClient(server.url)
    assert [file.path for file in client.list_artifacts(run_id)] == ["report.md"]
    assert Path(client.download_artifacts(run_id, "report.md", str(tmp_path))).read_text() == "# Report"
    with urllib.request.urlopen(f"{server.objects}/{BUCKET}", timeout=LIMIT_S) as listing:
        assert "report.md" in listing.read().decode(), "the server wrote the artifact to the object store"

    log_in("reader", passwords["reader"])
    assert client.get_run(run_id).data.metrics == {"train/loss": 0.5}
    with pytest.raises(MlflowException, match="Permission denied"):
        client.log_metric(run_id, "train/loss", 0.1)
    log_in("reader", "wrong")
    with pytest.raises(MlflowException):
        client.get_run(run_id)


def test_the_file_of_accounts_is_read_by_mlflow() -> None:
    parser = configparser.ConfigParser()
    parser.read(FOLDER / "basic_auth.ini")
    assert parser["mlflow"]["database_uri"] == "sqlite:///users.db"
    assert "admin_password" not in parser["mlflow"]
